"""Write a transformers model as a checkpoint folder that is whole or absent."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rerail.errors import InputError
from rerail.export.manifest import NAME, write_manifest
from rerail.files import whole_file
from rerail.plan.apply import COUNT_KEYS
from rerail.plan.plan import Plan


def check_target(path: Path) -> None:
    """Check that nothing but an earlier export would be replaced.

    Raises:
        InputError: `path` is a file, or a folder that holds something else.
    """
    if not path.exists() or (path / NAME).exists():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise InputError(
            f"export path {str(path)!r} exists and is not an earlier export; name a new or empty "
            "folder"
        )


def write_checkpoint(
    model: PreTrainedModel,
    path: Path,
    tokenizer: Any,
    plan: Plan,
    facts: Mapping[str, Any],
    code: Mapping[str, str] | None = None,
) -> Path:
    """Write weights (sharded safetensors), configs, tokenizer, code (by file name) and manifest.

    Raises:
        InputError: as `check_target`, or no space is left on the device.
    """
    check_target(path)
    with whole_file(path) as folder:
        model.save_pretrained(folder)
        _write_aliases(folder / "config.json", model.config)
        if tokenizer is not None:
            _as_loaded(tokenizer).save_pretrained(folder)
        for name, text in (code or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        write_manifest(folder, plan, facts)
    return path


def _write_aliases(path: Path, config: Any) -> None:
    """Write the expert count under each name that the family gives it.

    transformers 5.23 writes `num_local_experts` for Qwen3-MoE, and readers before 5.16 look for
    `num_experts`; other families have the like. Which names mean the same says `attribute_map`.
    """
    written = json.loads(path.read_text(encoding="utf-8"))
    names = {name for name in COUNT_KEYS if name in written}
    counts = {a: written[n] for a, n in type(config).attribute_map.items() if n in names}
    written |= {alias: n for alias, n in counts.items() if alias in COUNT_KEYS}
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_loaded(tokenizer: Any) -> Any:
    """Return the tokenizer with the longest input that its files named, not the one in use."""
    longest = getattr(tokenizer, "init_kwargs", {}).get("model_max_length")
    if longest is None or longest == tokenizer.model_max_length:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = longest
    return tokenizer
