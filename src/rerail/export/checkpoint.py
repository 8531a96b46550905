"""A checkpoint folder, whole or absent, with `compression.json`: what was done to the weights."""

import copy
import dataclasses
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from rerail.errors import InputError
from rerail.export.carried import carry_over, with_towers
from rerail.export.classes import is_stock
from rerail.files import read_json, whole_file, write_json
from rerail.moe.families import expert_count_aliases
from rerail.moe.left_out import NOTHING, LeftOut
from rerail.moe.model import MoEModel
from rerail.plan.plan import Plan
from rerail.plan.sizes import Sizes
from rerail.versions import package_version

MANIFEST = "compression.json"
_PACKAGES = ("rerail", "torch", "transformers", "safetensors", "tokenizers")


def check_target(path: Path) -> None:
    """Check that nothing but an earlier export would be replaced.

    Raises:
        InputError: `path` is a file, or a folder that holds something else.
    """
    if not path.exists() or (path / MANIFEST).exists():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise InputError(
            f"export path {str(path)!r} exists and is not an earlier export; name a new or empty "
            "folder"
        )


def write_checkpoint(  # noqa: PLR0913
    model: PreTrainedModel,
    path: Path,
    tokenizer: Any,
    plan: Plan,
    facts: Mapping[str, Any],
    code: Mapping[str, str] | None = None,
    companions: Mapping[str, Path] | None = None,
    carried: LeftOut = NOTHING,
) -> Path:
    """Write weights (sharded safetensors), configs, tokenizer, code (by file name) and manifest.

    Args:
        model: of transformers, in the dtype that is written.
        path: the folder.
        tokenizer: is written where there are no companions.
        plan, facts: for the manifest.
        code: source files by name.
        companions: files beside the parent's weights by name; they are copied byte for byte, and
            a parent without a tokenizer or a generation config leaves a child without one.
        carried: tensors of the parent's files that are copied as they are.

    Raises:
        InputError: as `check_target`, or no space is left on the device.
    """
    check_target(path)
    with whole_file(path) as folder:
        _save_weights(model, folder, keep_generation=companions is None)
        _complete_config(folder / "config.json", model.config, carried)
        carry_over(folder, carried.tensors)
        if tokenizer is not None and companions is None:
            _as_loaded(tokenizer).save_pretrained(folder)
        for name, source in (companions or {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                content = source.read_bytes()
            except OSError as error:
                raise InputError(f"{source} cannot be read ({error.strerror})") from error
            (folder / name).write_bytes(content)
        for name, text in (code or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        _write_manifest(folder, plan, facts)
    return path


def _save_weights(model: PreTrainedModel, folder: Path, keep_generation: bool) -> None:
    """Write weights and config, and the generation config only where it is to be kept."""
    generation: Any = model.generation_config
    # transformers refuses to write settings that contradict each other, which a parent may have
    fresh: Any = GenerationConfig
    model.generation_config = generation if keep_generation else fresh()
    try:
        # names of ours have no other format, though transformers finds one for some families
        model.save_pretrained(folder, save_original_format=is_stock(model.config))
    finally:
        model.generation_config = generation
    if not keep_generation:
        (folder / "generation_config.json").unlink(missing_ok=True)


def _complete_config(path: Path, config: Any, carried: LeftOut) -> None:
    """Write the expert count under each name that the family gives it, and what is carried."""
    written = json.loads(path.read_text(encoding="utf-8"))
    written |= expert_count_aliases(config, written)
    parent = carried.folder / "config.json" if carried.folder else None
    written = with_towers(written, parent, carried.names)
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_loaded(tokenizer: Any) -> Any:
    """Return the tokenizer with the longest input that its files named, not the one in use."""
    longest = getattr(tokenizer, "init_kwargs", {}).get("model_max_length")
    if longest is None or longest == tokenizer.model_max_length:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = longest
    return tokenizer


def _write_manifest(folder: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Describe a folder that holds everything else already.

    Args:
        folder: the checkpoint; its files are counted in bytes.
        plan: its decisions (kept slots, slot maps, forms) and lineage are written in full.
        facts: whatever else is known, JSON-able (target, dtype, parent, choices, evaluation, ...).
    """
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    versions = {p: package_version(p) for p in _PACKAGES}
    content = {
        **facts,
        "plan": {**plan.to_json(), "fingerprint": plan.fingerprint()},
        "files": files,
        "weight_bytes": sum(n for name, n in files.items() if name.endswith(".safetensors")),
        "versions": versions | {"python": platform.python_version()},
    }
    write_json(folder / MANIFEST, content)


def sizes_of(model: MoEModel, dtype: Any) -> dict[str, int]:
    """Return numbers and bytes counted from the tensors of the model that is written."""
    sizes = Sizes.of(model, dtype.itemsize)
    return {**dataclasses.asdict(sizes), "bytes": sizes.bytes}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint; `Plan.from_json(manifest["plan"])` gives the plan back.

    Raises:
        InputError: there is none, or it is not JSON.
    """
    path = folder / MANIFEST
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object; give a folder that rerail exported")
    return content


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint has a manifest and every file that it names at its size."""
    try:
        files = read_manifest(folder)["files"].items()
        return all((folder / name).stat().st_size == size for name, size in files)
    except (InputError, OSError, KeyError, AttributeError, TypeError, ValueError):
        return False
