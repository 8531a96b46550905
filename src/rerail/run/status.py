"""The status file of a cell: what it is doing, by which process, and how it ended."""

import contextlib
import time
from pathlib import Path
from typing import Any

from rerail.errors import InputError
from rerail.files import write_json
from rerail.parallel import is_first
from rerail.processes import slurm_job, this_process

EVERY = 2.0  # seconds between two reports of progress


class Status:
    """The cell's own status file: what it is doing, by which process, and how it ended.

    It holds state (running, done, failed or not_applicable), stage, reason, time of writing
    (seconds since 1970), host, pid and started (of the process), job (of Slurm, or null) and
    progress ({label, done, of}, or null). Only the first of several processes writes it.
    """

    def __init__(self, folder: Path):
        self.path = folder / "status.json"
        self.stage = ""
        self._written = 0.0

    def write(self, state: str, stage: str = "", reason: str = "") -> None:
        """Write the state: running, done, failed or not_applicable.

        Raises:
            InputError: the file cannot be written.
        """
        self.stage = stage
        self._put(state, reason, None)

    def progress(self, label: str, done: int, of: int) -> None:
        """Say how far the stage is; written at most every `EVERY` seconds, if it can be."""
        if time.monotonic() - self._written >= EVERY:
            with contextlib.suppress(InputError):  # no reason to end the work
                self._put("running", "", {"label": label, "done": done, "of": of})

    def fail(self, reason: str) -> None:
        """Write that the cell failed, if it can be: the failure is what its caller goes on with."""
        with contextlib.suppress(InputError):
            self.write("failed", self.stage, reason)

    def _put(self, state: str, reason: str, progress: dict[str, Any] | None) -> None:
        if not is_first():
            return
        self._written = time.monotonic()
        what = {"state": state, "stage": self.stage, "reason": reason, "progress": progress}
        who = {**this_process(), "job": slurm_job(), "time": time.time()}
        write_json(self.path, {**what, **who})
