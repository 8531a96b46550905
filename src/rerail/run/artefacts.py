"""Finished stages of a cell on disk: each is whole and hashed, or is made again."""

import json
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rerail.files import file_digest, read_sealed, whole_file, write_json, write_sealed

Stage = tuple[dict[str, Any], dict[str, Tensor]]


def saved(path: Path, make: Callable[[], Stage]) -> Stage:
    """Return a stage's (plain data, tensors): read back where it is sound, else made and written.

    The seconds that making took are kept in the data under `seconds`, the peak memory of the
    process in bytes under `peak_memory`.
    """
    held = _read(path)
    if held is not None:
        return held
    start = time.perf_counter()
    data, tensors = make()
    data = {**data, "seconds": time.perf_counter() - start, "peak_memory": peak_memory()}
    data = json.loads(json.dumps(data))
    tensors = {n: t.detach().contiguous().cpu() for n, t in tensors.items()}
    beside = path.with_suffix(".safetensors")
    with whole_file(beside) as temporary:
        temporary.write_bytes(save(tensors))
    write_sealed(path, {"data": data, "tensors": file_digest(beside)})
    return data, tensors


def _read(path: Path) -> Stage | None:
    content = read_sealed(path)
    beside = path.with_suffix(".safetensors")
    if content is None or not beside.exists() or file_digest(beside) != content["tensors"]:
        return None
    try:
        return content["data"], load_file(beside)
    except SafetensorError:
        return None


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


class Status:
    """The cell's own status file: what it is doing, and how it ended."""

    def __init__(self, folder: Path):
        self.path = folder / "status.json"

    def write(self, state: str, stage: str = "", reason: str = "") -> None:
        """Write the state: running, done, failed or not_applicable."""
        write_json(
            self.path, {"state": state, "stage": stage, "reason": reason, "time": time.time()}
        )
