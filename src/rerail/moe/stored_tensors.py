"""What the safetensors files of a checkpoint hold, read from their headers alone."""

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_LONGEST_HEADER = 2**28  # bytes; a damaged file names any length
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        dtype: in the words of safetensors, such as `BF16` or `F8_E4M3`.
        shape: its sizes.
        file: that it lies in.
        start: of its bytes in the file.
        bytes: their number.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    bytes: int

    @property
    def numbers(self) -> int:
        """How many it has."""
        return prod(self.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint by name; nothing where its files are not there or broken.

    What is broken is left to the loader, which names it.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _files(folder):
        try:
            tensors |= tensors_in(path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
    return tensors


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name."""
    state = path.stat()
    return _header(path, state.st_size, state.st_mtime_ns)


def main_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """Return the dtype of most of the numbers, None where that is no plain float."""
    numbers: Counter[str] = Counter()
    for tensor in tensors.values():
        numbers[tensor.dtype] += tensor.numbers
    return _FLOATS.get(numbers.most_common(1)[0][0]) if numbers else None


def _files(folder: Path) -> list[Path]:
    """Return the files that transformers reads."""
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return [folder / SINGLE] if (folder / SINGLE).is_file() else []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


@functools.cache
def _header(path: Path, size: int, _: int) -> dict[str, StoredTensor]:
    """Return what the header of a file says; it is read once while size and time stay the same."""
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > min(size, _LONGEST_HEADER):
            raise ValueError(f"{path} has a header of {length} bytes")
        entries = json.loads(handle.read(length))
    entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        place = (path, 8 + length + start, end - start)
        tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), *place)
    return tensors
