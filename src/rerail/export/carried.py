"""Tensors that an export takes over from the parent's files as they are, byte by byte.

They join the written weights in their one file; where those are several files, they get files of
their own, and the index names them all.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from rerail.export.classes import PREFIX
from rerail.files import whole_file, write_json
from rerail.moe.families import count_names
from rerail.moe.left_out import is_claim, is_sense
from rerail.moe.stored_tensors import INDEX, SINGLE, StoredTensor, stored_tensors

# entries of a parent that are not true of its export
_NOT_OURS = ("quantization_config", "auto_map")
_CHUNK = 2**24  # bytes that are in memory at a time


def carry_over(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Copy tensors beside the weights of a checkpoint.

    Args:
        folder: a checkpoint that was just written.
        tensors: of the parent's files, by the names that they keep.
    """
    if not tensors:
        return
    own = stored_tensors(folder)
    if (folder / SINGLE).exists():
        _copy({**own, **tensors}, folder / SINGLE)
        return
    places = {name: tensor.file.name for name, tensor in own.items()}
    by_file = sorted(tensors.items(), key=lambda item: (str(item[1].file), item[1].start))
    for number, (_, group) in enumerate(groupby(by_file, lambda item: item[1].file), 1):
        path = folder / f"model-carried-{number:05}.safetensors"
        places |= dict.fromkeys(_copy(dict(group), path), path.name)
    size = sum(tensor.bytes for tensor in [*own.values(), *tensors.values()])
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _copy(tensors: Mapping[str, StoredTensor], path: Path) -> Iterable[str]:
    """Write a safetensors file of tensors that lie in others, and return their names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        place = [end, end := end + tensor.bytes]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8 bytes
    with whole_file(path) as temporary, temporary.open("wb") as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for file, group in groupby(tensors.values(), lambda tensor: tensor.file):
            with file.open("rb") as reader:
                for tensor in group:
                    reader.seek(tensor.start)
                    _copy_bytes(reader, writer, tensor.bytes)
    return tensors


def _copy_bytes(reader: BinaryIO, writer: BinaryIO, count: int) -> None:
    while count:
        chunk = reader.read(min(count, _CHUNK))
        if not chunk:
            raise OSError(f"{reader.name} has become shorter since it was loaded")
        writer.write(chunk)
        count -= len(chunk)


def with_towers(
    written: Mapping[str, Any], parent: Path | None, carried: Iterable[str]
) -> dict[str, Any]:
    """Return a written config that also claims the towers which are carried over.

    Where the parent's config is that of a wrapper around this very text model, the export is such
    a wrapper too. Otherwise (the config is ours) the wrapper's other entries are only added.

    Args:
        written: config of the text model.
        parent: the parent's `config.json`.
        carried: names of tensors.
    """
    if parent is None or not any(map(is_sense, carried)):
        return dict(written)
    wrapper: dict[str, Any] = json.loads(parent.read_text(encoding="utf-8"))
    family = str(written["model_type"]).removeprefix(PREFIX)
    parts = {
        n: v["model_type"] for n, v in wrapper.items() if isinstance(v, dict) and "model_type" in v
    }
    inside = next((name for name, part in parts.items() if part == family), None)
    # `torch_dtype` is the former name of `dtype`, which is written
    whole = {n: v for n, v in wrapper.items() if n not in (inside, "torch_dtype", *_NOT_OURS)}
    if inside is None or family != written["model_type"]:
        return {**whole, **written}
    outer = ("architectures", "transformers_version", "auto_map")
    text = {name: value for name, value in written.items() if name not in outer}
    for name in whole.keys() & written.keys():
        if name in ("dtype", "transformers_version", *count_names()) or is_claim(name):
            whole[name] = written[name]
    return {**whole, inside: text}
