"""Pruners and their relatives: some experts stay. Open: `select`, or for pruners `score`."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Decision, LayerWise, ScopePlan, Scopes
from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation, check_kept
from rerail.plan.budget import Ratio
from rerail.plan.plan import LayerPlan
from rerail.statistics.statistic import (
    LayerStatistics,
    RoutedStatistic,
    RoutedTokens,
    Statistic,
    StatisticSet,
)

Formed = tuple[LayerPlan, Mapping[str, Tensor]]


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


def dense_spec(kept: Sequence[tuple[int, int]]) -> BankSpec:
    """Return the spec of a bank that stores these (layer, expert) pairs as they are."""
    return BankSpec("dense", len(kept), tuple(((layer, e, 1.0),) for layer, e in kept))


@dataclass(frozen=True, kw_only=True)
class Selector(LayerWise):
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

    def decide(self, layer: MoELayer, statistics: LayerStatistics, share: int) -> Decision:
        """Select, and give what stays its form."""
        return Decision(*self.form(layer, statistics, self.select(layer, statistics, share)))


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
class Guarded(RowSelector):
    """A row selector that can be told never to drop super experts (arXiv 2507.23279, eq. 6).

    With a_le the largest |output| of expert e of layer l before its gate, an expert is guarded iff
    a_le > P99.5(all a) and a_le > 0.1 max(all a); both thresholds compare all layers, so a guarded
    method plans all layers as one scope. The paper guards layers that create massive activations;
    REAP's code, followed here, takes the first int(0.75 L) MoE layers for them (`super`), or all
    (`outliers`). That code ranks signed outputs; here they are absolute, as in the paper.

    Attributes:
        guard: `none`, `super` or `outliers`.
    """

    guard: Literal["none", "super", "outliers"] = "none"

    @property
    @abstractmethod
    def measures(self) -> tuple[Statistic, ...]:
        """The statistics that choosing reads, the guard's own left out."""

    @abstractmethod
    def choose(
        self,
        layer: MoELayer,
        statistics: LayerStatistics,
        count: int,
        guarded: frozenset[int],
    ) -> tuple[int, ...]:
        """Return the `count` slots whose experts stay, ascending, the guarded ones among them."""

    @property
    def requires(self) -> tuple[Statistic, ...]:
        """What choosing and guarding read."""
        return self.measures if self.guard == "none" else (*self.measures, MaxOutput())

    def select(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> tuple[int, ...]:
        """Choose without a guard."""
        return self.choose(layer, statistics, count, frozenset())

    def scopes(self, layers: Sequence[MoELayer]) -> Scopes:
        """Return all layers as one scope where a guard compares them."""
        return super().scopes(layers) if self.guard == "none" else [list(range(len(layers)))]

    def guarded(self, statistics: Sequence[LayerStatistics]) -> list[frozenset[int]]:
        """Return each layer's guarded slots."""
        if self.guard == "none":
            return [frozenset() for _ in statistics]
        return guarded_slots([held[MaxOutput()] for held in statistics], self.guard)

    def needed(self, layer: MoELayer, guarded: frozenset[int], each: int) -> int:
        """Return the lowest count with all guarded slots and `each` in every router group."""
        size = layer.num_experts // layer.num_groups
        groups = [slot // size for slot in guarded]
        return sum(max(each, groups.count(g)) for g in range(layer.num_groups))

    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Ratio,
        allocation: Allocation,
    ) -> list[int]:
        """Return kept counts; a guarded expert competes as the best of its layer."""
        views = [statistics.of(layer, self.requires) for layer in layers]
        guarded = self.guarded(views)
        least, scores = [], []
        for layer, held, slots in zip(layers, views, guarded, strict=True):
            least.append(self.needed(layer, slots, layer.least_per_group))
            score = torch.ones(layer.num_experts)  # a fixed allocation looks at no score
            if not allocation.fixed:
                score = self.rank(layer, held).clone()
                score[sorted(slots)] = score.max()
            scores.append(score)
        return allocation.keep(layers, ratio, scores, least)

    def plan_scope(
        self,
        layers: Sequence[MoELayer],
        statistics: Sequence[LayerStatistics],
        shares: Sequence[int],
    ) -> ScopePlan:
        """Choose in each layer, guarded slots included.

        Raises:
            OutOfReach: a layer must drop guarded experts.
        """
        parts = []
        for layer, held, share, slots in zip(
            layers, statistics, shares, self.guarded(statistics), strict=True
        ):
            if slots and (least := self.needed(layer, slots, self.each(layer, share))) > share:
                raise OutOfReach(
                    f"layer {layer.index} cannot be cut to {share} of {layer.num_experts} experts: "
                    f"guard={self.guard} protects {sorted(slots)}, so at least {least} are needed; "
                    "allowed: a lower ratio, or compressor.guard=none"
                )
            kept = self.choose(layer, held, share, slots)
            parts.append(self.form(layer, held, kept)[0])
        return ScopePlan(tuple(parts), {})


@dataclass(frozen=True, kw_only=True)
class Pruner(Guarded):
    """Keeps the experts of highest score."""

    @abstractmethod
    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return (E,), higher means keep; an expert that was never routed to scores lowest."""

    def rank(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Rank by score."""
        return self.score(layer, statistics)

    def choose(
        self,
        layer: MoELayer,
        statistics: LayerStatistics,
        count: int,
        guarded: frozenset[int],
    ) -> tuple[int, ...]:
        """Return the guarded slots, then those of the highest scores."""
        score = self.score(layer, statistics).double().clone()
        score[sorted(guarded)] = torch.inf
        return best(score, count, layer.num_groups, self.each(layer, count))


def guarded_slots(largest: Sequence[Tensor], guard: str) -> list[frozenset[int]]:
    """Return the super experts of each layer, from each layer's largest outputs (E,)."""
    every = torch.cat(list(largest)).double()
    threshold = torch.maximum(every.quantile(0.995), 0.1 * every.max())
    watched = len(largest) if guard == "outliers" else int(0.75 * len(largest))
    above = [(a > threshold).nonzero().flatten().tolist() for a in largest[:watched]]
    return [frozenset(slots) for slots in above] + [frozenset()] * (len(largest) - watched)


def best(score: Tensor, count: int, groups: int = 1, each: int = 0) -> tuple[int, ...]:
    """Return the slots of the `count` highest scores, ascending; at least `each` in every group.

    Ties keep the lower slot, so that a plan does not depend on the sort.
    """
    order = torch.argsort(score, descending=True, stable=True).tolist()
    size = len(score) // groups
    kept = [s for g in range(groups) for s in [s for s in order if s // size == g][:each]]
    rest = [s for s in order if s not in kept]
    return tuple(sorted(kept + rest[: count - len(kept)]))
