"""Compressed students of tiny teachers, and calibration blocks to repair them on."""

import torch

from families import tokens
from rerail.experts.base import BankSpec
from rerail.moe.model import MoEModel
from rerail.plan.apply import apply_plan
from rerail.plan.plan import LayerPlan, Plan
from rerail.text.calibration import TokenBlocks

KEPT = (0, 2, 3, 5, 6)
GROUPED = (0, 2, 3, 5, 6, 7)  # three in each of two groups


def kept_of(teacher: MoEModel) -> tuple[int, ...]:
    """Return slots that a slice may keep."""
    return GROUPED if teacher.layers[0].num_groups > 1 else KEPT


def sliced(teacher: MoEModel, kept: tuple[int, ...] | None = None) -> MoEModel:
    """Return a student with a shorter router and fewer experts in every layer."""
    kept = kept_of(teacher) if kept is None else kept
    slots = tuple(range(len(kept)))
    return _student(teacher, "slice", kept, slots, [((e, 1.0),) for e in kept])


def masked(teacher: MoEModel) -> MoEModel:
    """Return a student that keeps all router rows and never chooses some."""
    kept = kept_of(teacher)
    slots = tuple(kept.index(e) if e in kept else 0 for e in range(8))
    return _student(teacher, "mask", kept, slots, [((e, 1.0),) for e in kept])


def merged(teacher: MoEModel) -> MoEModel:
    """Return a student whose eight slots share four averages of two neighbours."""
    groups = [((2 * i, 0.5), (2 * i + 1, 0.5)) for i in range(4)]
    return _student(teacher, "untouched", tuple(range(8)), (0, 0, 1, 1, 2, 2, 3, 3), groups)


def _student(teacher, router, kept, slots, groups):
    parts = []
    for layer in teacher.layers:
        members = tuple(tuple((layer.index, e, w) for e, w in group) for group in groups)
        bank = BankSpec("dense", len(members), members)
        parts.append(LayerPlan(layer.index, kept, slots, router, bank))
    return apply_plan(teacher, Plan(tuple(parts)))


def blocks(count: int = 24, length: int = 12, padded: bool = True, seed: int = 0) -> TokenBlocks:
    """Return random blocks; with `padded`, every second one ends in padding."""
    ids = tokens(count, length, seed)
    mask = torch.ones(count, length, dtype=torch.bool)
    if padded:
        mask[1::2, length * 2 // 3 :] = False
        ids[~mask] = 0
    return TokenBlocks(ids, mask, f"random-{count}-{length}-{padded}-{seed}")
