"""Mergers whose merged experts are stored as low-rank factors. Open: the field `merger`."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from rerail.compress.base import NO_HOOKS, Compressor, Decision, Layers, PlanHooks, Statistics
from rerail.compress.solvers.grouping import merged_experts
from rerail.compress.solvers.ranks import Ranks, ranks_within
from rerail.compress.solvers.subspace import joint_low_rank
from rerail.compress.solvers.whitening import layer_moments, moment_statistics
from rerail.compress.templates.merger import Merger
from rerail.errors import InputError, OutOfReach
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Budget, Ratio, dense_numbers, numbers_kept
from rerail.plan.plan import Plan
from rerail.statistics.statistic import LayerStatistics, Statistic, StatisticSet


@dataclass(frozen=True, kw_only=True)
class LowRankMerger(Compressor):
    """Groups experts as a merger does and stores low-rank averages; a count is of groups.

    M is rounded up where each merged expert loses `inner` of its numbers, and ranks take up the
    budget: all merged experts of the model may store equally many numbers.

    Attributes:
        merger: how experts are grouped, weighted and routed to; its own solve is left out.
        inner: share of its numbers that a merged expert loses.
        whiten: see experts through the text; false is C = 1, the plain projection.
        shrink, ridge: how moments are made safe, see `whitening.Moments`.
        each: numbers that one merged expert may store; comes from the budget.
    """

    merger: Merger
    inner: float = 0.2
    whiten: bool = True
    shrink: float = 0.25
    ridge: float = 1e-6
    each: float = field(default=0.0, repr=False, compare=False)

    paradigm: ClassVar[str] = "merging"

    @property
    def written_out(self) -> Literal["no", "yes", "never"]:
        return "yes"

    def __post_init__(self) -> None:
        if not 0 <= self.inner < 1:
            raise InputError(f"compressor.inner={self.inner} is outside [0, 1)")

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return tuple(dict.fromkeys([*self.merger.requires, *moment_statistics(self.whiten)]))

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        removed = max(0.0, 1 - (1 - (budget.removed or 0.0)) / (1 - self.inner))
        return self.merger.allocate(layers, statistics, Ratio(removed), allocation)

    def fitted(self, layers: Layers, budget: Budget, allocation: Allocation) -> "LowRankMerger":
        """Return the method with `each`: what the budget leaves, shared by all merged experts."""
        allowed = sum(numbers_kept(dense_numbers(la), budget.removed or 0.0) for la in layers)
        stored = sum(self.allocate(layers, None, budget, allocation))  # a sum that stays
        return replace(self, each=allowed / stored)

    def ranks(self, layer: MoELayer, count: int) -> dict[str, tuple[int, ...]]:
        """Return a rank for each merged expert by matrix type."""
        (_, p, d, _), cost = layer.dims, layer.intermediate_size + layer.hidden_size
        most = 3 * min(p, d) * cost * count
        types = {name: Ranks(cost, min(p, d), count) for name in layer.dims.matrices}
        return ranks_within(layer, min(most, int(self.each * count + 1e-6)), 0, types, {})

    def check(self, layers: Layers, budget: Budget, allocation: Allocation) -> None:
        """Check the budget, and that factors can be had within it."""
        super().check(layers, budget, allocation)
        if any(set(layer.dims.numbers) != {"gate_up_proj", "down_proj"} for layer in layers):
            raise OutOfReach(
                f"{type(self).__name__} cannot store merged experts with biases as factors; "
                "allowed: ratios from 0 to 0, or the merger alone"
            )
        fitted = self.fitted(layers, budget, allocation)
        counts = fitted.allocate(layers, None, budget, allocation)
        for layer, count in zip(layers, counts, strict=True):
            fitted.ranks(layer, count)

    def plan(
        self,
        layers: Layers,
        statistics: StatisticSet,
        budget: Budget,
        allocation: Allocation,
        hooks: PlanHooks = NO_HOOKS,
    ) -> Plan:
        fitted = self.fitted(layers, budget, allocation)
        return super(LowRankMerger, fitted).plan(layers, statistics, budget, allocation, hooks)

    def decide_layer(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Decision:
        labels = self.merger.group(layer, statistics, count)
        weights = self.merger.member_weights(layer, statistics, labels)
        merged = merged_experts(layer, labels, weights)
        means = layer.layout.unpack(merged["gate_up_proj"], merged["down_proj"])
        moments = layer_moments(layer, statistics, self.whiten, self.shrink, self.ridge)
        ranks, tensors = self.ranks(layer, count), dict[str, Tensor]()
        for mean, (name, stack) in zip(means, layer.stack()._asdict().items(), strict=True):
            u, v = joint_low_rank(mean, stack, labels, moments[name], ranks[name])
            tensors |= {f"{name}.U": u, f"{name}.V": v}
        spec = BankSpec("low_rank", count, (), ranks, {"rows": "own"})
        plan, rows = self.merger.router_plan(layer, statistics, labels, spec)
        return Decision(plan, {**tensors, **rows})
