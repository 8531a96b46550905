"""Pruners and their relatives: some experts stay. Open: `select`, or for pruners `score`."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.compressor import Compressor, ScopePlan
from rerail.errors import OutOfReach
from rerail.moe.bank import BankSpec
from rerail.moe.layer import MoELayer
from rerail.plan.allocation import Allocation, check_kept
from rerail.plan.plan import LayerPlan
from rerail.plan.ratio import Ratio
from rerail.stats.statistic import LayerStatistics, StatisticSet

Formed = tuple[LayerPlan, Mapping[str, Tensor]]


def dense_spec(kept: Sequence[tuple[int, int]]) -> BankSpec:
    """Return the spec of a bank that stores these (layer, expert) pairs as they are."""
    return BankSpec("dense", len(kept), tuple(((layer, e, 1.0),) for layer, e in kept))


@dataclass(frozen=True, kw_only=True)
class Selector(Compressor):
    """Keeps some experts of each layer; a share is the number of experts kept."""

    paradigm: ClassVar[str] = "pruning"

    @abstractmethod
    def rank(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return (E,), higher means keep: what allocations compare across layers."""

    @abstractmethod
    def select(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> tuple[int, ...]:
        """Return the `count` slots whose experts stay, ascending."""

    @abstractmethod
    def form(self, layer: MoELayer, statistics: LayerStatistics, kept: tuple[int, ...]) -> Formed:
        """Return the layer's decision, and solved tensors by short name."""

    @abstractmethod
    def least(self, layer: MoELayer) -> int:
        """Return the lowest count of experts that a layer can keep."""

    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """Check the counts before anything heavy."""
        even = [torch.ones(layer.num_experts) for layer in layers]
        least = [self.least(layer) for layer in layers]
        check_kept(layers, allocation.keep(layers, ratio, even, least), least)

    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Ratio,
        allocation: Allocation,
    ) -> list[int]:
        """Return kept counts, by the allocation's rule."""
        scores = [self.rank(layer, statistics.of(layer, self.requires)) for layer in layers]
        return allocation.keep(layers, ratio, scores, [self.least(layer) for layer in layers])

    def plan_scope(
        self,
        layers: Sequence[MoELayer],
        statistics: Sequence[LayerStatistics],
        shares: Sequence[int],
    ) -> ScopePlan:
        """Select in each layer, and give what stays its form."""
        parts = []
        tensors: dict[str, Tensor] = {}
        for layer, held, share in zip(layers, statistics, shares, strict=True):
            part, solved = self.form(layer, held, self.select(layer, held, share))
            parts.append(part)
            tensors |= {f"{layer.index}.{name}": t for name, t in solved.items()}
        return ScopePlan(tuple(parts), tensors)


@dataclass(frozen=True, kw_only=True)
class RowSelector(Selector):
    """Drops the other experts' router rows too, or never selects them.

    A grouped router keeps the same number in each group when it is sliced, since slicing would
    move experts between groups.

    Attributes:
        router: `slice` keeps only the kept rows; `mask` keeps all E and never selects the others.
    """

    router: Literal["slice", "mask"] = "slice"

    def least(self, layer: MoELayer) -> int:
        """Return what top_k and groups need."""
        return layer.num_groups * layer.least_per_group

    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """Check top_k and groups before anything heavy."""
        super().check(layers, ratio, allocation)
        even = [torch.ones(layer.num_experts) for layer in layers]
        counts = allocation.keep(layers, ratio, even, [self.least(layer) for layer in layers])
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

    def each(self, layer: MoELayer, count: int) -> int:
        """Return how many of `count` experts each router group must keep."""
        return count // layer.num_groups if self.router == "slice" else layer.least_per_group

    def form(self, layer: MoELayer, statistics: LayerStatistics, kept: tuple[int, ...]) -> Formed:
        """Return the sliced or masked layer; the experts stay the teacher's own."""
        spec = dense_spec([(layer.index, slot) for slot in kept])
        if self.router == "slice":
            return LayerPlan(layer.index, kept, tuple(range(len(kept))), "slice", spec), {}
        position = {slot: i for i, slot in enumerate(kept)}
        slots = tuple(position.get(slot, 0) for slot in range(layer.num_experts))
        return LayerPlan(layer.index, kept, slots, "mask", spec), {}


@dataclass(frozen=True, kw_only=True)
class Pruner(RowSelector):
    """Keeps the experts of highest score."""

    @abstractmethod
    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return (E,), higher means keep; an expert that was never routed to scores lowest."""

    def rank(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Rank by score."""
        return self.score(layer, statistics)

    def select(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> tuple[int, ...]:
        """Return the slots of the highest scores."""
        each = self.each(layer, count)
        return best(self.score(layer, statistics), count, layer.num_groups, each)


def best(score: Tensor, count: int, groups: int = 1, each: int = 0) -> tuple[int, ...]:
    """Return the slots of the `count` highest scores, ascending; at least `each` in every group.

    Ties keep the lower slot, so that a plan does not depend on the sort.
    """
    order = torch.argsort(score, descending=True, stable=True).tolist()
    size = len(score) // groups
    kept = [s for g in range(groups) for s in [s for s in order if s // size == g][:each]]
    rest = [s for s in order if s not in kept]
    return tuple(sorted(kept + rest[: count - len(kept)]))
