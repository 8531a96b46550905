"""Set searchers: groups of layers keep one set of experts, and whole students are judged.

Open: `search`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import (
    NO_HOOKS,
    Compressor,
    Counts,
    Decision,
    Fitness,
    Layers,
    PlanHooks,
    Scopes,
    Statistics,
    Views,
    extended,
)
from rerail.compress.router_rows import best_slots, check_equal_groups, sliced
from rerail.errors import InputError, OutOfReach
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Budget
from rerail.plan.plan import LayerPlan, Plan
from rerail.statistics.routed import Count
from rerail.statistics.statistic import StatisticSet


@dataclass(frozen=True, kw_only=True)
class SetSearcher(Compressor):
    """Keeps in each group of layers the experts of the student that is judged best.

    Attributes:
        groups: of layers that share choices; a layer each where there are fewer layers.
        measure, blocks: what students are judged by (minus the KL to the teacher, or ESAP), and the
            leading blocks of the calibration text that it is measured on.
        seed: of all draws.
    """

    groups: int = 4
    measure: Literal["kl", "esap"] = "kl"
    blocks: int = 16
    seed: int = 0

    paradigm: ClassVar[str] = "pruning"

    requires = (Count(),)

    def __post_init__(self) -> None:
        for name in ("groups", "blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"compressor.{name}={getattr(self, name)} must be at least 1")

    @abstractmethod
    def search(self, layers: Layers, first: Plan, fitness: Fitness) -> tuple[Plan, dict[str, Any]]:
        """Return the best plan, and what its lineage says of the search.

        Args:
            layers: of the original model.
            first: the plan that keeps the most used experts.
            fitness: of a plan's student, higher is better.
        """

    @property
    def judged_by(self) -> tuple[str, int] | None:
        return self.measure, self.blocks

    def scopes(self, layers: Layers) -> Scopes:
        """Return the groups of layers.

        Raises:
            InputError: they do not divide the layers, or layers of a group differ in size.
        """
        number, count = len(layers), min(self.groups, len(layers))
        size = number // count
        scopes = [list(range(i, i + size)) for i in range(0, number, size)]
        if number % count:
            allowed = [n for n in range(1, number + 1) if number % n == 0]
            raise InputError(
                f"compressor.groups={self.groups} does not divide {number} MoE layers; allowed: "
                f"{allowed}"
            )
        if any(len({layers[i].num_experts for i in scope}) > 1 for scope in scopes):
            raise InputError(
                f"compressor.groups={self.groups} puts layers of different numbers of experts "
                f"together; allowed: {number}"
            )
        return scopes

    def least_experts(self, layer: MoELayer) -> int:
        return layer.num_groups * layer.least_per_group

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Return kept experts, equally many in every layer of a group."""
        if not allocation.uniform:
            raise OutOfReach(
                f"{type(self).__name__} keeps one set in several layers and cannot follow "
                f"{allocation}; allowed: allocation=uniform"
            )
        self.scopes(layers)
        counts = super().allocate(layers, statistics, budget, allocation)
        check_equal_groups(layers, counts, allocation, "a pruner with compressor.router=mask")
        return counts

    def decide(self, layers: Layers, statistics: Views, counts: Counts) -> list[Decision]:
        """Return the first set of a group of layers: the most used experts."""
        used, groups = torch.stack([view[Count()] for view in statistics]), layers[0].num_groups
        kept = best_slots(used.sum(dim=0), counts[0], groups, counts[0] // groups)
        return [Decision(sliced(layer, kept)) for layer in layers]

    def plan(
        self,
        layers: Layers,
        statistics: StatisticSet,
        budget: Budget,
        allocation: Allocation,
        hooks: PlanHooks = NO_HOOKS,
    ) -> Plan:
        """Return the best plan.

        Raises:
            InputError: nothing judges students.
        """
        if hooks.fitness is None:
            raise InputError(f"{type(self).__name__} judges students on text, and there is none")
        first = super().plan(layers, statistics, budget, allocation, hooks)
        best, found = self.search(layers, first, hooks.fitness)
        return replace(best, lineage={**first.lineage, "search": found})

    def keeping(self, layers: Layers, sets: Sequence[Sequence[int]]) -> Plan:
        """Return the plan that keeps these slots in each group of layers."""
        pairs = zip(self.scopes(layers), sets, strict=True)
        plans = [sliced(layers[i], tuple(kept)) for scope, kept in pairs for i in scope]
        return extended(Plan(), [Decision(plan) for plan in plans])

    def made_of(
        self, layers: Layers, sets: Sequence[Sequence[int]], matrices: Sequence[Tensor]
    ) -> Plan:
        """Return the plan of stored experts sum_i W[j, i] expert_i that answer the kept slots.

        Args:
            layers: of the original model.
            sets: kept slots of each group of layers, ascending.
            matrices: W (M, E) of each group.
        """
        decisions = []
        for scope, kept, matrix in zip(self.scopes(layers), sets, matrices, strict=True):
            for index in (layers[i].index for i in scope):
                members = tuple(
                    tuple((index, e, w) for e, w in enumerate(row) if w) for row in matrix.tolist()
                )
                spec = BankSpec("dense", len(kept), members)
                slots = tuple(range(len(kept)))
                decisions.append(Decision(LayerPlan(index, tuple(kept), slots, "slice", spec)))
        return extended(Plan(), decisions)
