"""Pruners: drop the experts with the lowest score. One function is open: `score`."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.compressor import Compressor, ScopePlan
from rerail.errors import OutOfReach
from rerail.moe.bank import BankSpec
from rerail.moe.layer import MoELayer
from rerail.plan.plan import LayerPlan
from rerail.plan.ratio import Allocation, Ratio, check_kept
from rerail.stats.statistic import LayerStatistics, StatisticSet


def dense_spec(kept: Sequence[tuple[int, int]]) -> BankSpec:
    """Return the spec of a bank that stores these (layer, expert) pairs as they are."""
    return BankSpec("dense", len(kept), tuple(((layer, e, 1.0),) for layer, e in kept))


@dataclass(frozen=True, kw_only=True)
class Pruner(Compressor):
    """Keeps the experts of highest score in each layer; a share is the number of experts kept.

    A grouped router keeps the same number in each group when it is sliced, since slicing would
    move experts between groups.

    Attributes:
        router: `slice` keeps only the kept rows; `mask` keeps all E and never selects the others.
    """

    router: Literal["slice", "mask"] = "slice"

    paradigm: ClassVar[str] = "pruning"

    @abstractmethod
    def score(self, statistics: LayerStatistics) -> Tensor:
        """Return (E,), higher means keep; an expert that was never routed to scores lowest."""

    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """Check top_k and groups before anything heavy."""
        even = [torch.ones(layer.num_experts) for layer in layers]
        counts = allocation.keep(layers, ratio, even, _least(layers))
        check_kept(layers, counts, _least(layers))
        for layer, count in zip(layers, counts, strict=True):
            if self.router == "mask" or layer.num_groups == 1:
                continue
            if not allocation.fixed or count % layer.num_groups:
                raise OutOfReach(
                    f"layer {layer.index} cannot be sliced to {count} experts by {allocation}: "
                    f"its router has {layer.num_groups} groups that must stay equal; keep a "
                    f"multiple of {layer.num_groups} in each layer by allocation=uniform, or set "
                    "compressor.router=mask"
                )

    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Ratio,
        allocation: Allocation,
    ) -> list[int]:
        """Return kept counts, by the allocation's rule."""
        scores = [self.score(statistics.of(layer, self.requires)) for layer in layers]
        return allocation.keep(layers, ratio, scores, _least(layers))

    def plan_scope(
        self,
        layers: Sequence[MoELayer],
        statistics: Sequence[LayerStatistics],
        shares: Sequence[int],
    ) -> ScopePlan:
        """Keep the best `share` experts of each layer."""
        parts = []
        for layer, held, share in zip(layers, statistics, shares, strict=True):
            groups = layer.num_groups
            each = share // groups if self.router == "slice" else layer.least_per_group
            kept = best(self.score(held), share, groups, each)
            parts.append(_layer_plan(layer, kept, self.router))
        return ScopePlan(tuple(parts), {})


def _least(layers: Sequence[MoELayer]) -> list[int]:
    return [layer.num_groups * layer.least_per_group for layer in layers]


def best(score: Tensor, count: int, groups: int = 1, each: int = 0) -> tuple[int, ...]:
    """Return the slots of the `count` highest scores, ascending; at least `each` in every group.

    Ties keep the lower slot, so that a plan does not depend on the sort.
    """
    order = torch.argsort(score, descending=True, stable=True).tolist()
    size = len(score) // groups
    kept = [s for g in range(groups) for s in [s for s in order if s // size == g][:each]]
    rest = [s for s in order if s not in kept]
    return tuple(sorted(kept + rest[: count - len(kept)]))


def _layer_plan(
    layer: MoELayer, kept: tuple[int, ...], router: Literal["slice", "mask"]
) -> LayerPlan:
    spec = dense_spec([(layer.index, slot) for slot in kept])
    if router == "slice":
        return LayerPlan(layer.index, kept, tuple(range(len(kept))), "slice", spec)
    position = {slot: i for i, slot in enumerate(kept)}
    slots = tuple(position.get(slot, 0) for slot in range(layer.num_experts))
    return LayerPlan(layer.index, kept, slots, "mask", spec)
