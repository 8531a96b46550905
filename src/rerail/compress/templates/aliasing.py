"""Aliasers: all slots of a scope are answered by a pool of its own experts, as they are.

Open: `contribution`, `apart`, `score`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerail.compress.base import Compressor, ScopePlan, Scopes
from rerail.compress.templates.pruning import best
from rerail.errors import InputError, OutOfReach
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation, check_kept
from rerail.plan.budget import Ratio
from rerail.plan.plan import LayerPlan
from rerail.statistics.statistic import LayerStatistics, StatisticSet


@dataclass(frozen=True, kw_only=True)
class Aliaser(Compressor):
    """A share is the number of prototypes that a layer brings to the pool of its scope.

    The router keeps all rows: two chosen slots with one prototype add their gate weights. In a
    scope of one layer the student reads the teacher's own experts. A prototype that answers in
    another layer too is counted and written once, but each such layer holds a copy in memory.

    Attributes:
        window: W, the consecutive MoE layers of a scope.
        native: prototypes that each layer has at least.
        fuse: average the experts of all slots of a prototype into it.
    """

    window: int = 1
    native: int = 0
    fuse: bool = False

    paradigm: ClassVar[str] = "pruning"

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.window < 1 or self.native < 0:
            raise InputError(
                f"compressor.window={self.window} must be at least 1, and compressor.native="
                f"{self.native} at least 0"
            )

    @abstractmethod
    def contribution(self, statistics: LayerStatistics) -> Tensor:
        """Return (E,), what each expert does: what allocations compare across layers."""

    @abstractmethod
    def apart(self, layers: Sequence[MoELayer], statistics: Sequence[LayerStatistics]) -> Tensor:
        """Return distances of the scope's experts (N, N), layer by layer."""

    @abstractmethod
    def score(self, contribution: Tensor, apart: Tensor) -> Tensor:
        """Return (N,), higher means prototype."""

    def scopes(self, layers: Sequence[MoELayer]) -> Scopes:
        """Return windows of consecutive layers."""
        everyone = list(range(len(layers)))
        return [everyone[i : i + self.window] for i in everyone[:: self.window]]

    def least(self, layers: Sequence[MoELayer]) -> list[int]:
        """Return the lowest count of each layer; top_k is no bound."""
        return [max(1, self.native)] * len(layers)

    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """Check windows and counts before anything heavy."""
        for scope in self.scopes(layers):
            sizes = {(layers[i].num_experts, layers[i].expert_size) for i in scope}
            if len(sizes) > 1:
                raise OutOfReach(
                    f"layers {[layers[i].index for i in scope]} cannot share experts: their number "
                    "and size must be equal; use compressor.window=1"
                )
        even, least = [torch.ones(layer.num_experts) for layer in layers], self.least(layers)
        check_kept(layers, allocation.keep(layers, ratio, even, least), least)

    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Ratio,
        allocation: Allocation,
    ) -> list[int]:
        """Return counts of prototypes, by the allocation's rule on contributions."""
        views = [statistics.of(layer, self.requires) for layer in layers]
        scores = [self.contribution(held) for held in views]
        return allocation.keep(layers, ratio, scores, self.least(layers))

    def plan_scope(
        self,
        layers: Sequence[MoELayer],
        statistics: Sequence[LayerStatistics],
        shares: Sequence[int],
    ) -> ScopePlan:
        """Choose the scope's pool; every other slot goes to its nearest prototype, lower id first.

        A layer's bank names the prototypes that it reads, so that nothing is gathered in vain.
        """
        apart = self.apart(layers, statistics)
        score = self.score(torch.cat([self.contribution(held) for held in statistics]), apart)
        pool = torch.tensor(best(score, sum(shares), len(layers), self.native))
        owner = apart[:, pool].argmin(dim=1)
        owner[pool] = torch.arange(len(pool))
        slots, size, parts = owner.tolist(), layers[0].num_experts, []
        place = [(layer.index, e) for layer in layers for e in range(size)]
        served = [[s for s, o in enumerate(slots) if o == p] for p in range(len(pool))]
        groups = served if self.fuse else [[s] for s in pool.tolist()]
        members = [tuple((*place[s], 1 / len(group)) for s in group) for group in groups]
        for i, layer in enumerate(layers):
            mine = slots[i * size : (i + 1) * size]
            used = sorted(set(mine))
            spec = BankSpec("dense", len(used), tuple(members[p] for p in used))
            answers = tuple(used.index(p) for p in mine)
            parts.append(LayerPlan(layer.index, tuple(range(size)), answers, "untouched", spec))
        return ScopePlan(tuple(parts), {})
