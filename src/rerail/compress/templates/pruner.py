"""Pruners: some experts of each layer stay as they are, with their router rows. Open: `score`.

A grouped router keeps the same number in each group when it is sliced, since slicing would move
experts between groups.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Compressor, Counts, Decision, Layers, Scopes, Statistics, Views
from rerail.compress.guard import (
    GuardMode,
    Slots,
    check_guarded,
    guard_statistics,
    guarded_slots,
    least_with,
    with_guarded_first,
)
from rerail.compress.router_rows import best_slots, check_equal_groups, masked, sliced
from rerail.errors import OutOfReach
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation, removed_shares
from rerail.plan.budget import Budget
from rerail.statistics.statistic import LayerStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class Pruner(Compressor):
    """Keeps the experts of the highest scores; a method that searches overrides `choose`.

    Attributes:
        router: `slice` keeps only the kept rows; `mask` keeps all E and never selects the others.
        guard: which super experts always stay, see `rerail.compress.guard`.
        sequential: measure each layer on the model whose earlier layers are pruned already.
    """

    router: Literal["slice", "mask"] = "slice"
    guard: GuardMode = "none"
    sequential: bool = False

    paradigm: ClassVar[str] = "pruning"

    @property
    def measures(self) -> tuple[Statistic, ...]:
        """The statistics that choosing reads, the guard's own left out; none by default."""
        return ()

    @abstractmethod
    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return (E,), higher means keep; an expert that was never routed to scores lowest.

        It is what allocations compare across layers.
        """

    def choose(
        self, layer: MoELayer, statistics: LayerStatistics, num_kept: int, guarded: Slots
    ) -> tuple[int, ...]:
        """Return the slots whose experts stay, ascending, the guarded ones among them."""
        score = self.score(layer, statistics).double()
        score = with_guarded_first(score, guarded, torch.inf)
        return best_slots(score, num_kept, layer.num_groups, self.least_per_group(layer, num_kept))

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return (*self.measures, *guard_statistics(self.guard))

    @property
    def driver(self) -> Literal["one_shot", "sequential"]:
        return "sequential" if self.sequential and self.measures else "one_shot"

    def scopes(self, layers: Layers) -> Scopes:
        # a guard compares all layers
        return super().scopes(layers) if self.guard == "none" else [list(range(len(layers)))]

    def least_per_group(self, layer: MoELayer, num_kept: int) -> int:
        """Return how many of the kept experts each router group must have."""
        return num_kept // layer.num_groups if self.router == "slice" else layer.least_per_group

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Return kept experts; a guarded one competes as the best of its layer."""
        if self.sequential and (self.guard != "none" or allocation.compares):
            raise OutOfReach(
                f"{type(self).__name__} cannot reach guard={self.guard} with {allocation}: "
                "compressor.sequential=true measures one layer at a time; allowed: guard=none with "
                "allocation=uniform or per_layer"
            )
        needed, scores = [self.least_experts(layer) for layer in layers], None
        if statistics is not None:
            views = [statistics.of(layer, self.requires) for layer in layers]
            guarded = guarded_slots(views, self.guard)
            pairs = list(zip(layers, guarded, strict=True))
            needed = [least_with(layer, slots, layer.least_per_group) for layer, slots in pairs]
            if allocation.compares:  # else no score is looked at, and some are dear
                scored = [self.score(la, view) for la, view in zip(layers, views, strict=True)]
                scores = [
                    with_guarded_first(score, slots, score.max())
                    for score, slots in zip(scored, guarded, strict=True)
                ]
        shares = removed_shares(layers, budget, allocation, needed, scores)
        counts = [self.count(layer, share) for layer, share in zip(layers, shares, strict=True)]
        if self.router == "slice":
            check_equal_groups(layers, counts, allocation, "compressor.router=mask")
        return counts

    def least_experts(self, layer: MoELayer) -> int:
        return layer.num_groups * layer.least_per_group

    def decide(self, layers: Layers, statistics: Views, counts: Counts) -> list[Decision]:
        """Choose in each layer, guarded slots included.

        Raises:
            OutOfReach: a layer must drop guarded experts.
        """
        guarded, decisions = guarded_slots(statistics, self.guard), []
        for layer, view, count, slots in zip(layers, statistics, counts, guarded, strict=True):
            check_guarded(layer, slots, count, self.least_per_group(layer, count), self.guard)
            decisions.append(self.formed(layer, view, self.choose(layer, view, count, slots)))
        return decisions

    def formed(
        self, layer: MoELayer, statistics: LayerStatistics, kept: tuple[int, ...]
    ) -> Decision:
        """Return the decision once it is known which experts stay; they stay as they are."""
        return Decision((sliced if self.router == "slice" else masked)(layer, kept))
