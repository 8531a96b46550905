"""What a Slurm job does: one cell, from the snapshot of its sweep."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

Run = Callable[[Mapping[str, Any]], tuple[str, str]]


class CellFailed(RuntimeError):
    """The cell is recorded as failed; raised so that Slurm says so too."""


class Job:
    """Runs or finishes one cell; submitit calls it, and submits it again when it is preempted.

    Args:
        run: a function of the package, imported by its name in the job.
        file: the cell's resolved choices, cells/<n>.yaml of the sweep.
    """

    def __init__(self, run: Run, file: Path):
        self.run, self.file = run, file

    def __call__(self) -> str:
        """Run the cell; its state, done or not_applicable.

        Raises:
            CellFailed: it failed; the reason is in its row, the traceback in its folder.
        """
        state, reason = self.run(yaml.safe_load(self.file.read_text(encoding="utf-8")))
        if state == "failed":
            raise CellFailed(reason)
        return state

    def checkpoint(self) -> Any:
        """Return the same call: what is finished lies in the cell's folder and is read back."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    __submitit_checkpoint__ = checkpoint  # the name that later versions of submitit look for
