"""The store: what is costly is made once, and used again while it is whole and its code the same.

An artefact is plain data and tensors. It lies in `<name>.json`, sealed with a hash of its content,
and its tensors in `<name>.safetensors` beside it, whose hash the JSON holds. The path is the key:
all inputs that can change a number belong in it. The code that makes it is the other half, and is
kept inside (`rerail.code_version`): a formula that is mended does not meet its old tensors.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from rerail.code_version import code_version
from rerail.config.secrets import redacted
from rerail.errors import InputError
from rerail.files import digest, file_digest, read_json, refusals, whole_file, write_json
from rerail.parallel import read_or_make

if TYPE_CHECKING:
    from torch import Tensor  # torch is imported only where there are tensors

log = logging.getLogger(__name__)

Code = type | Callable[..., Any]


class Artefact(NamedTuple):
    """What is stored: `data` is JSON-able, `tensors` have names of their own."""

    data: Any
    tensors: "Mapping[str, Tensor]" = MappingProxyType({})


def get(path: Path, make: Callable[[], Artefact | None], code: Sequence[Code] = ()) -> Artefact:
    """Return an artefact: read where it is sound and made by the same code, else made and written.

    In a group of processes all make it together, and what the first one made counts.

    Args:
        path: of its JSON file.
        make: makes it; None on the other processes of a group will do.
        code: the functions and classes that decide what is made; by default the function around
            `make` with all that it reaches.
    """
    version = code_version(*(code or (make,)))
    return read_or_make(lambda: read(path, version), make, lambda made: write(path, made, version))


def read(path: Path, version: str = "") -> Artefact | None:
    """Return a stored artefact of a version of its code.

    Returns:
        None where it is absent, was made by other code, or is damaged (which is logged).
    """
    content = _read_sealed(path)
    if content is None:
        return None
    if not isinstance(content, dict) or content.keys() != {"data", "tensors", "version"}:
        _warn_of_damage(path)
        return None
    if content["version"] != version:
        log.info("%s was made by other code and will be made again", path)
        return None
    data, seal = content["data"], content["tensors"]
    if seal is None:
        return Artefact(data)
    from safetensors.torch import load_file

    beside = path.with_suffix(".safetensors")
    if not beside.is_file() or file_digest(beside) != seal:
        _warn_of_damage(beside)
        return None
    return Artefact(data, load_file(beside))


def write(path: Path, artefact: Artefact | None, version: str = "") -> Artefact:
    """Store an artefact, each file whole or not at all, and return it as it will be read back.

    Raises:
        InputError: no space is left on the device.
    """
    if artefact is None:
        raise TypeError(f"{path} has nothing to hold: the first process must make it")
    # as JSON will have it (tuples are lists): what is made and what is read are the same
    data = json.loads(json.dumps(artefact.data, sort_keys=True))
    tensors = {n: t.detach().contiguous().cpu() for n, t in artefact.tensors.items()}
    seal = None
    if tensors:
        from safetensors.torch import save

        beside = path.with_suffix(".safetensors")
        # tensors first: JSON with their hash exists only when they do
        with whole_file(beside) as temporary:
            temporary.write_bytes(save(tensors))
            seal = file_digest(temporary)
    _write_sealed(path, {"data": data, "tensors": seal, "version": version})
    return Artefact(data, tensors)


@contextlib.contextmanager
def sealed_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` with a seal beside it, for `is_sound`.

    The seal is written first and names both the new content and the one before, so that at any
    moment the file that is there has its seal.
    """
    with whole_file(path) as temporary:
        yield temporary
        before = _seals(path)
        _write_sealed(_seal_path(path), [file_digest(temporary), *before[:1]])


def is_sound(path: Path) -> bool:
    """Return whether a file is as `sealed_file` left it; damage is logged."""
    if not path.is_file():
        return False
    if file_digest(path) in _seals(path):
        return True
    _warn_of_damage(path)
    return False


def remove_sealed(path: Path) -> None:
    """Remove a file of `sealed_file` and its seal."""
    with refusals(path, _seal_path(path)):
        path.unlink(missing_ok=True)
        _seal_path(path).unlink(missing_ok=True)


def _seal_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.seal")


def _seals(path: Path) -> list[str]:
    hashes = _read_sealed(_seal_path(path))
    return hashes if isinstance(hashes, list) else []


def _write_sealed(path: Path, content: Any) -> None:
    content = redacted(content)
    write_json(path, {"sha256": digest(content), "content": content})


def _read_sealed(path: Path) -> Any | None:
    """Return the content of sealed JSON, or None where it is absent or (logged) damaged."""
    if not os.path.lexists(path):
        return None
    try:
        file = read_json(path)
        if file["sha256"] == digest(file["content"]):
            return file["content"]
    except (InputError, KeyError, TypeError):
        pass
    _warn_of_damage(path)
    return None


def _warn_of_damage(path: Path) -> None:
    log.warning("%s is damaged (its hash does not match) and will be made again", path)
