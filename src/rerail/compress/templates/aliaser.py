"""Aliasers: all slots of a scope are answered by a pool of its own experts, as they are.

Open: `compared`, `distances`, `score`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Compressor, Counts, Decision, Layers, Scopes, Statistics, Views
from rerail.compress.router_rows import best_slots
from rerail.errors import InputError, OutOfReach
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Budget
from rerail.plan.plan import LayerPlan
from rerail.statistics.statistic import LayerStatistics


@dataclass(frozen=True, kw_only=True)
class Aliaser(Compressor):
    """Chooses prototypes; a count is of those that a layer brings to the pool of its scope.

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

    @property
    def written_out(self) -> Literal["no", "yes", "never"]:
        return "yes"

    def __post_init__(self) -> None:
        if self.window < 1 or self.native < 0:
            raise InputError(
                f"compressor.window={self.window} must be at least 1, and compressor.native="
                f"{self.native} at least 0"
            )

    @abstractmethod
    def compared(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return (E,), what each expert contributes."""

    @abstractmethod
    def distances(self, layers: Layers, statistics: Sequence[LayerStatistics]) -> Tensor:
        """Return distances of the scope's experts (N, N), layer by layer."""

    @abstractmethod
    def score(self, contribution: Tensor, distances: Tensor) -> Tensor:
        """Return (N,), higher means prototype."""

    def scopes(self, layers: Layers) -> Scopes:
        everyone = list(range(len(layers)))
        return [everyone[i : i + self.window] for i in everyone[:: self.window]]

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Return counts of prototypes, once the layers of each scope are known to be alike."""
        for scope in self.scopes(layers):
            if len({(layers[i].num_experts, layers[i].expert_size) for i in scope}) > 1:
                raise OutOfReach(
                    f"layers {[layers[i].index for i in scope]} cannot share experts: their number "
                    "and size must be equal; use compressor.window=1"
                )
        return super().allocate(layers, statistics, budget, allocation)

    def least_experts(self, layer: MoELayer) -> int:
        return max(1, self.native)  # top_k is no bound

    def decide(self, layers: Layers, statistics: Views, counts: Counts) -> list[Decision]:
        """Choose the scope's pool; every other slot goes to its nearest prototype, lower id first.

        A layer's bank names the prototypes that it reads, so that nothing is gathered in vain.
        """
        distances = self.distances(layers, statistics)
        pairs = zip(layers, statistics, strict=True)
        contribution = torch.cat([self.compared(layer, view) for layer, view in pairs])
        score = self.score(contribution, distances)
        pool = torch.tensor(best_slots(score, sum(counts), len(layers), self.native))
        owner = distances[:, pool].argmin(dim=1)
        owner[pool] = torch.arange(len(pool))  # also where a twin with a lower id is as near
        owners, size, decisions = owner.tolist(), layers[0].num_experts, []
        members = self._members(layers, owners, pool.tolist())
        for i, layer in enumerate(layers):
            own = owners[i * size : (i + 1) * size]
            used = sorted(set(own))
            spec = BankSpec("dense", len(used), tuple(members[p] for p in used))
            slots = tuple(used.index(p) for p in own)
            plan = LayerPlan(layer.index, tuple(range(size)), slots, "untouched", spec)
            decisions.append(Decision(plan))
        return decisions

    def _members(
        self, layers: Layers, owners: Sequence[int], pool: Sequence[int]
    ) -> list[tuple[tuple[int, int, float], ...]]:
        """Return what each prototype is made of: itself, or the mean of the slots it answers."""
        place = [(layer.index, e) for layer in layers for e in range(layers[0].num_experts)]
        served = [[s for s, owner in enumerate(owners) if owner == p] for p in range(len(pool))]
        groups = served if self.fuse else [[slot] for slot in pool]
        return [tuple((*place[s], 1 / len(group)) for s in group) for group in groups]
