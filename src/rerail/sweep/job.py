"""What a Slurm job does: one cell, from the snapshot of its sweep."""

from pathlib import Path
from typing import Any

from rerail.run.task import SweepCell, run


class CellFailed(RuntimeError):
    """The cell is recorded as failed; raised so that Slurm says so too."""


class Job:
    """Runs or finishes one cell; submitit calls it, and submits it again when it is preempted.

    Args:
        file: the resolved cell, cells/<n>.yaml of the sweep.
    """

    def __init__(self, file: Path):
        self.file = file

    def __call__(self) -> str:
        """Run the cell; its state, done or not_applicable.

        Raises:
            CellFailed: it failed; the reason is in its row, the traceback in its folder.
        """
        state, reason = run(SweepCell.load(self.file))
        if state == "failed":
            raise CellFailed(reason)
        return state

    def checkpoint(self) -> Any:
        """Return the same call: what is finished lies in the cell's folder and is read back."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    __submitit_checkpoint__ = checkpoint  # the name that later versions of submitit look for
