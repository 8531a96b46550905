"""The native target: a plain transformers checkpoint that loads anywhere without rerail."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rerail.export.manifest import sizes_of
from rerail.export.stock import recast, stock_model
from rerail.export.writing import check_target, write_checkpoint
from rerail.moe.layer import MoEModel
from rerail.moe.source import ModelSource
from rerail.plan.plan import Plan


def stored_dtype(source: ModelSource) -> torch.dtype | None:
    """Return the dtype of a checkpoint, not the one it was loaded in; None where it names none."""
    dtype = getattr(source.config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def as_written(
    student: MoEModel, dtype: torch.dtype | None = None, densify: bool = False
) -> MoEModel:
    """Return the model that `export_native` writes, in the dtype in which the student runs.

    This is what a reload is compared with, and the rule is: the weights are rounded once to the
    written dtype, and both sides then compute in the student's running dtype. A bfloat16 checkpoint
    of a student that runs in float32 is therefore compared in float32 with the student whose
    weights went through bfloat16, and equal bits are expected. What the rounding itself changed is
    the difference between this model and the student: zero for weights that came from such a
    checkpoint, small for those that were made in float32 (trained router rows, merged or expanded
    experts).

    Raises:
        InputError: stock transformers cannot hold the student.
    """
    runs: torch.dtype = student.model.dtype
    return recast(recast(stock_model(student, densify), dtype or runs), runs)


def export_native(  # noqa: PLR0913
    student: MoEModel,
    plan: Plan,
    path: Path,
    *,
    tokenizer: Any = None,
    manifest: Mapping[str, Any] | None = None,
    densify: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a checkpoint that stock `from_pretrained` loads, and return its path.

    The folder appears whole or not at all, and the student is not touched. The number of experts is
    written under every name that the family gives it; `num_experts_per_tok` needs no change, since
    no valid plan leaves fewer selectable rows.

    Args:
        student: what `apply_plan` returned, repaired or not.
        plan: the plan it came from, for the manifest.
        path: a new or empty folder, or an earlier export, which is replaced.
        tokenizer: is written beside the weights.
        manifest: further facts for `compression.json` (parent, choices, evaluation).
        densify: turn every stored form into one whole expert for each router row.
        dtype: of the parent's checkpoint; by default the one in which the student runs.

    Raises:
        InputError: stock transformers cannot hold the student, `path` holds something else, or no
            space is left.
    """
    check_target(path)
    dtype = dtype or student.model.dtype
    written = recast(stock_model(student, densify), dtype)
    facts = {
        **(manifest or {}),
        "target": "native",
        "densified": densify,
        "dtype": str(dtype).removeprefix("torch."),
        "sizes": sizes_of(written, dtype),
    }
    return write_checkpoint(written.model, path, tokenizer, plan, facts)
