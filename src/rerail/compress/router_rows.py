"""Which slots stay, and what a router keeps of their rows: shared by pruners and mergers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.plan import LayerPlan


def best_slots(
    score: Tensor, count: int, num_groups: int = 1, least_per_group: int = 0
) -> tuple[int, ...]:
    """Return the slots of the `count` highest scores (E,), ascending, with enough in every group.

    Ties keep the lower slot, so that a plan does not depend on the sort.
    """
    order = torch.argsort(score, descending=True, stable=True).tolist()
    size = len(score) // num_groups
    groups = [[slot for slot in order if slot // size == g] for g in range(num_groups)]
    first = [slot for group in groups for slot in group[:least_per_group]]
    rest = [slot for slot in order if slot not in first]
    return tuple(sorted(first + rest[: count - len(first)]))


def dense_spec(members: Sequence[tuple[int, int]]) -> BankSpec:
    """Return the spec of a bank that stores these (layer, expert) pairs as they are."""
    return BankSpec("dense", len(members), tuple(((layer, e, 1.0),) for layer, e in members))


def sliced(layer: MoELayer, kept: tuple[int, ...]) -> LayerPlan:
    """Return the plan that keeps some experts, as they are, and only their router rows."""
    spec = dense_spec([(layer.index, slot) for slot in kept])
    return LayerPlan(layer.index, kept, tuple(range(len(kept))), "slice", spec)


def masked(layer: MoELayer, kept: tuple[int, ...]) -> LayerPlan:
    """Return the plan that keeps some experts, as they are, and never selects the other rows."""
    spec = dense_spec([(layer.index, slot) for slot in kept])
    position = {slot: i for i, slot in enumerate(kept)}
    # a masked slot is never selected, but it must name a stored expert: the first
    slots = tuple(position.get(slot, 0) for slot in range(layer.num_experts))
    return LayerPlan(layer.index, kept, slots, "mask", spec)


def check_equal_groups(
    layers: Sequence[MoELayer], counts: Sequence[int], allocation: Allocation, instead: str
) -> None:
    """Check that fewer rows leave the groups of a grouped router equal.

    Slicing moves experts between groups unless each group keeps the same number.

    Raises:
        OutOfReach: they would not; `instead` is the setting that is free of this.
    """
    for layer, count in zip(layers, counts, strict=True):
        if layer.num_groups > 1 and (allocation.compares or count % layer.num_groups):
            raise OutOfReach(
                f"layer {layer.index} cannot be left {count} router rows by {allocation}: its "
                f"router has {layer.num_groups} groups that must stay equal; allowed: multiples of "
                f"{layer.num_groups} rows a layer and allocation=uniform, or {instead}"
            )
