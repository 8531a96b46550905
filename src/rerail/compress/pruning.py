"""Pruners: drop the experts with the lowest score. One function is open: `score`."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.compressor import Compressor, ScopePlan
from rerail.errors import InputError
from rerail.moe.bank import BankSpec
from rerail.moe.layer import MoELayer
from rerail.plan.plan import LayerPlan
from rerail.plan.ratio import Allocation, GlobalScore, Ratio, check_kept
from rerail.stats.statistic import LayerStatistics, StatisticSet


def dense_spec(kept: Sequence[int]) -> BankSpec:
    """Return the spec of a bank that stores these experts of the teacher as they are."""
    return BankSpec("dense", len(kept), tuple(((int(e), 1.0),) for e in kept))


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
        if isinstance(allocation, GlobalScore):
            allocation.keep(layers, ratio, [torch.ones(layer.num_experts) for layer in layers])
            return
        counts = allocation.keep(layers, ratio, None)
        check_kept(layers, counts, selectable=True)
        for layer, count in zip(layers, counts, strict=True):
            if self.router == "slice" and count % layer.num_groups:
                raise InputError(
                    f"the ratio keeps {count} experts in layer {layer.index}, and its router has "
                    f"{layer.num_groups} groups that must stay equal; keep a multiple of {layer.num_groups} or "
                    "set compressor.router=mask"
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
        return allocation.keep(layers, ratio, scores)

    def plan_scope(
        self,
        layers: Sequence[MoELayer],
        statistics: Sequence[LayerStatistics],
        shares: Sequence[int],
    ) -> ScopePlan:
        """Keep the best `share` experts of each layer."""
        parts = []
        for layer, held, share in zip(layers, statistics, shares, strict=True):
            groups = layer.num_groups if self.router == "slice" else 1
            kept = best(self.score(held), share, groups)
            parts.append(_layer_plan(layer, kept, self.router))
        return ScopePlan(tuple(parts), {})


def best(score: Tensor, count: int, groups: int = 1) -> tuple[int, ...]:
    """Return the slots of the `count` highest scores, ascending; `count / groups` in each group.

    Ties keep the lower slot, so that a plan does not depend on the sort.
    """
    size = len(score) // groups
    kept: list[int] = []
    for g in range(groups):
        part = score[g * size : (g + 1) * size]
        order = torch.argsort(part, descending=True, stable=True)[: count // groups]
        kept += [g * size + int(i) for i in order]
    return tuple(sorted(kept))


def _layer_plan(
    layer: MoELayer, kept: tuple[int, ...], router: Literal["slice", "mask"]
) -> LayerPlan:
    if router == "slice":
        return LayerPlan(layer.index, kept, tuple(range(len(kept))), "slice", dense_spec(kept))
    position = {slot: i for i, slot in enumerate(kept)}
    slots = tuple(position.get(slot, 0) for slot in range(layer.num_experts))
    return LayerPlan(layer.index, kept, slots, "mask", dense_spec(kept))
