"""Finished stages of a cell on disk: each is whole and hashed, or is made again."""

import contextlib
import ctypes
import gc
import json
import logging
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from rerail.files import file_digest, read_sealed, whole_file, write_json, write_sealed
from rerail.parallel import is_first, read_or_make
from rerail.processes import slurm_job, this_process

log = logging.getLogger(__name__)

Stage = tuple[dict[str, Any], dict[str, Tensor]]

EVERY = 2.0  # seconds between two words about the progress of a stage


def saved(path: Path, make: Callable[[], Stage | None]) -> Stage:
    """Return a stage's (plain data, tensors): read back where it is sound, else made and written.

    In a group of processes all make it together, and what the first one has counts.
    The seconds that making took are kept in the data under `seconds`, the peak memory of the
    process in bytes under `peak_memory`.
    """

    def measured() -> tuple[Stage | None, dict[str, Any]]:
        start_peak()
        start = time.perf_counter()
        made = make()
        return made, {"seconds": time.perf_counter() - start, "peak_memory": peak_memory()}

    return read_or_make(lambda: _read(path), measured, lambda found: _written(path, *found))


def _written(path: Path, made: Stage | None, cost: dict[str, Any]) -> Stage:
    assert made is not None  # on the first process
    data, tensors = made
    data = json.loads(json.dumps({**data, **cost}, sort_keys=True))  # as it will be read back
    tensors = {n: t.detach().contiguous().cpu() for n, t in tensors.items()}
    seal = None
    if tensors:
        beside = path.with_suffix(".safetensors")
        with whole_file(beside) as temporary:
            temporary.write_bytes(save(tensors))
        seal = file_digest(beside)
    write_sealed(path, {"data": data, "tensors": seal})
    return data, tensors


def _read(path: Path) -> Stage | None:
    content = read_sealed(path)
    if content is None:
        return None
    if content["tensors"] is None:
        return content["data"], {}
    beside = path.with_suffix(".safetensors")
    if beside.exists() and file_digest(beside) == content["tensors"]:
        return content["data"], load_file(beside)
    log.warning("%s is damaged (its hash does not match) and will be made again", beside)
    return None


def start_peak() -> None:
    """Start a new peak of this process's memory, where the kernel can (Linux).

    What earlier work freed goes back to the system first, so that it is not counted again.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Return the peak resident memory since `start_peak` (elsewhere: of the process), in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


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
        """Write the state: running, done, failed or not_applicable."""
        self.stage = stage
        self._put(state, reason, None)

    def progress(self, label: str, done: int, of: int) -> None:
        """Say how far the stage is; written at most every `EVERY` seconds."""
        if time.monotonic() - self._written >= EVERY:
            self._put("running", "", {"label": label, "done": done, "of": of})

    def _put(self, state: str, reason: str, progress: dict[str, Any] | None) -> None:
        if not is_first():
            return
        self._written = time.monotonic()
        what = {"state": state, "stage": self.stage, "reason": reason, "progress": progress}
        who = {**this_process(), "job": slurm_job(), "time": time.time()}
        write_json(self.path, {**what, **who})
