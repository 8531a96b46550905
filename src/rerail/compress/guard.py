"""Super experts, which a pruner can be told never to drop (arXiv 2507.23279, eq. 6).

With a_le the largest |output| of expert e of layer l before its gate, an expert is guarded iff
a_le > P99.5(all a) and a_le > 0.1 max(all a); both thresholds compare all layers, so a guarded
pruner plans all layers as one scope. The paper guards layers that create massive activations;
REAP's code, followed here, takes the first int(0.75 L) MoE layers for them (`super`), or all
(`outliers`). That code ranks signed outputs; here they are absolute, as in the paper.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rerail.errors import OutOfReach
from rerail.moe.model import MoELayer
from rerail.statistics.statistic import LayerStatistics, RoutedStatistic, RoutedTokens, Statistic

GuardMode = Literal["none", "super", "outliers"]
Slots = frozenset[int]


@dataclass(frozen=True)
class MaxOutput(RoutedStatistic):
    """max over X_e and coordinates of |f|, 0 for a slot that was never chosen. float64 (E,)."""

    axes = "E"
    merges_by = "max"
    needs = frozenset({"outputs"})

    def measure(self, tokens: RoutedTokens) -> Tensor:
        assert tokens.outputs is not None
        largest = tokens.outputs.abs().amax(dim=-1).double().flatten()
        zeros = largest.new_zeros(tokens.num_experts)
        return torch.scatter_reduce(zeros, 0, tokens.index.flatten(), largest, "amax")


def guard_statistics(guard: GuardMode) -> tuple[Statistic, ...]:
    """Return what `guarded_slots` reads."""
    return () if guard == "none" else (MaxOutput(),)


def guarded_slots(statistics: Sequence[LayerStatistics], guard: GuardMode) -> list[Slots]:
    """Return each layer's guarded slots."""
    if guard == "none":
        return [frozenset() for _ in statistics]
    return super_experts([view[MaxOutput()] for view in statistics], guard)


def super_experts(largest: Sequence[Tensor], guard: GuardMode) -> list[Slots]:
    """Return the super experts of each layer, from each layer's largest outputs (E,)."""
    every = torch.cat(list(largest)).double()
    threshold = torch.maximum(every.quantile(0.995), 0.1 * every.max())
    watched = len(largest) if guard == "outliers" else int(0.75 * len(largest))
    above = [(a > threshold).nonzero().flatten().tolist() for a in largest[:watched]]
    return [frozenset(slots) for slots in above] + [frozenset()] * (len(largest) - watched)


def least_with(layer: MoELayer, guarded: Collection[int], least_per_group: int) -> int:
    """Return the lowest count with all guarded slots and so many in every router group."""
    size = layer.num_experts // layer.num_groups
    groups = [slot // size for slot in guarded]
    return sum(max(least_per_group, groups.count(g)) for g in range(layer.num_groups))


def check_guarded(
    layer: MoELayer, guarded: Slots, num_kept: int, least_per_group: int, guard: GuardMode
) -> None:
    """Check that all guarded slots of a layer can stay.

    Raises:
        OutOfReach: it would have to drop some.
    """
    if guarded and (least := least_with(layer, guarded, least_per_group)) > num_kept:
        raise OutOfReach(
            f"layer {layer.index} cannot be cut to {num_kept} of {layer.num_experts} experts: "
            f"guard={guard} protects {sorted(guarded)}, so at least {least} are needed; "
            "allowed: a lower ratio, or compressor.guard=none"
        )


def with_guarded_first(score: Tensor, guarded: Slots, to: Tensor | float) -> Tensor:
    """Return a copy of scores (E,) in which the guarded slots have the score `to`."""
    raised = score.clone()
    raised[sorted(guarded)] = to
    return raised
