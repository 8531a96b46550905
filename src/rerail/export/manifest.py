"""`compression.json`: what was done to a checkpoint, beside its weights."""

import dataclasses
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rerail.errors import InputError
from rerail.files import write_json
from rerail.moe.model import MoEModel
from rerail.plan.plan import Plan
from rerail.plan.sizes import Sizes
from rerail.versions import package_version

NAME = "compression.json"
_PACKAGES = ("rerail", "torch", "transformers", "safetensors", "tokenizers")


def write_manifest(folder: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Describe a folder that holds everything else already.

    Args:
        folder: the checkpoint; its files are counted in bytes.
        plan: its decisions (kept slots, slot maps, forms) and lineage are written in full.
        facts: whatever else is known, JSON-able (target, dtype, parent, choices, evaluation, ...).
    """
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    content = {
        **facts,
        "plan": {**plan.to_json(), "fingerprint": plan.fingerprint()},
        "files": files,
        "weight_bytes": sum(n for name, n in files.items() if name.endswith(".safetensors")),
        "versions": {p: package_version(p) for p in _PACKAGES}
        | {"python": platform.python_version()},
    }
    write_json(folder / NAME, content)


def sizes_of(model: MoEModel, dtype: Any) -> dict[str, int]:
    """Return numbers and bytes counted from the tensors of the model that is written."""
    sizes = Sizes.of(model, dtype.itemsize)
    return {**dataclasses.asdict(sizes), "bytes": sizes.bytes}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint; `Plan.from_json(manifest["plan"])` gives the plan back.

    Raises:
        InputError: there is none, or it is not JSON.
    """
    path = folder / NAME
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); give a folder that rerail exported"
        ) from error
    return content


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint has a manifest and every file that it names at its size."""
    try:
        files = read_manifest(folder)["files"].items()
        return all((folder / name).stat().st_size == size for name, size in files)
    except (InputError, OSError, KeyError):
        return False
