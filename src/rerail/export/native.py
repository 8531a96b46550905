"""The native target: a plain transformers checkpoint that loads anywhere without rerail."""

from pathlib import Path
from typing import Any

import torch

from rerail.export.targets import as_written, export_student
from rerail.moe.model import MoEModel
from rerail.moe.source import ModelSource
from rerail.plan.plan import Plan

__all__ = ["as_written", "export_native", "stored_dtype"]


def stored_dtype(source: ModelSource) -> torch.dtype | None:
    """Return the dtype of a checkpoint, not the one it was loaded in; None where it names none."""
    dtype = getattr(source.config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def export_native(student: MoEModel, plan: Plan, path: Path, **options: Any) -> Path:
    """Write a checkpoint that stock `from_pretrained` loads; see `export_student`."""
    return export_student(student, plan, path, form="native", **options)
