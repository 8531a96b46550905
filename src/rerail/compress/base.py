"""What a method is: a frozen dataclass that turns statistics into a plan."""

import dataclasses
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rerail.errors import InputError, OutOfReach
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation, PerLayer, check_kept, removed_shares
from rerail.plan.budget import Budget, Ratio, dense_numbers, units_kept
from rerail.plan.plan import LayerPlan, Plan
from rerail.statistics.statistic import LayerStatistics, Statistic, StatisticSet

Layers = Sequence[MoELayer]
Views = Sequence[LayerStatistics]
Counts = Sequence[int]
Statistics = StatisticSet | None  # None before any are known
Scopes = list[list[int]]
Progress = Callable[[Scopes], Iterable[list[int]]]
# statistics of some layers, measured on the student of the plan so far
Remeasure = Callable[[Plan, Sequence[MoELayer]], StatisticSet]
# how good the student of a plan is, higher is better: what a searching allocation asks
Fitness = Callable[[Plan], float]


class Decision(NamedTuple):
    """The decision about one layer, and what it was made with.

    Attributes:
        plan: of the layer.
        tensors: solved tensors by short name.
        notes: what a user should know (a fallback that was taken); they go into the lineage.
    """

    plan: LayerPlan
    tensors: Mapping[str, Tensor] = MappingProxyType({})
    notes: tuple[str, ...] = ()


class PlanHooks(NamedTuple):
    """What a caller adds to planning.

    Attributes:
        remeasure: gives a sequential method its statistics scope by scope; None plans from those
            of the original model.
        progress: wraps the scopes, to show a bar.
        fitness: judges plans, for a method that is `judged_by` something.
    """

    remeasure: Remeasure | None = None
    progress: Progress = lambda scopes: scopes
    fitness: Fitness | None = None


NO_HOOKS = PlanHooks()


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """A method. Its fields are its hyper-parameters; it touches no module, file or logger.

    Attributes:
        paradigm, paper: what it is and where it is from.
        budget: what it is swept by.
        allocations: which ones it can follow: `any`, `fixed` ones (that compare no scores of
            different layers) or only `uniform`.
    """

    paradigm: ClassVar[str]
    paper: ClassVar[str]
    budget: ClassVar[type[Budget]] = Ratio
    allocations: ClassVar[Literal["any", "fixed", "uniform"]] = "any"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        """The statistics that planning reads, all of them and no others; none by default."""
        return ()

    @property
    def driver(self) -> Literal["one_shot", "sequential"]:
        """`one_shot` plans from the original model's statistics, as by default.

        `sequential` measures each scope on the model whose earlier scopes are compressed already.
        """
        return "one_shot"

    @property
    def judged_by(self) -> tuple[str, int] | None:
        """What a method that searches judges students by: measure, and leading blocks of text."""
        return None

    @property
    def written_out(self) -> Literal["no", "yes", "never"]:
        """Whether stock experts hold what it leaves only once it is written out as whole experts.

        `never`: not even then. By default `no`: they hold it, or the plan alone can tell.
        """
        return "no"

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Return each layer's count in the template's unit (experts, numbers, bits ...).

        Args:
            layers: of the original model; without statistics they may lie on the meta device.
            statistics: None before any are known: scores then count as equal.
            budget: of the kind that `budget` names.
            allocation: how layers share it.

        Raises:
            OutOfReach: the budget cannot be reached; the sentence names the interval that can.
        """
        least, scores = [self.least_experts(layer) for layer in layers], None
        if statistics is not None and allocation.compares:  # else no score is looked at
            views = [statistics.of(layer, self.requires) for layer in layers]
            scores = [self.compared(la, view) for la, view in zip(layers, views, strict=True)]
        shares = removed_shares(layers, budget, allocation, least, scores)
        return [self.count(layer, share) for layer, share in zip(layers, shares, strict=True)]

    def count(self, layer: MoELayer, removed: float) -> int:
        """Return how many units of a layer stay once a share is gone; by default experts."""
        num_kept = units_kept(layer.num_experts, removed)
        check_kept([layer], [num_kept], [self.least_experts(layer)])
        return num_kept

    def least_experts(self, layer: MoELayer) -> int:
        """Return the fewest experts that a layer can be left with; by default one."""
        return 1

    def compared(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return (E,), higher means keep: what allocations compare across layers; else equal."""
        return torch.ones(layer.num_experts)

    def decide(self, layers: Layers, statistics: Views, counts: Counts) -> list[Decision]:
        """Decide about the layers of one scope; a layer without a decision stays as it is."""
        each = zip(layers, statistics, counts, strict=True)
        decisions = (self.decide_layer(*layer) for layer in each)
        return [decision for decision in decisions if decision is not None]

    def decide_layer(
        self, layer: MoELayer, statistics: LayerStatistics, count: int
    ) -> Decision | None:
        """Decide about one layer of a scope by itself; None leaves it as it is, as by default."""
        return None

    def scopes(self, layers: Layers) -> Scopes:
        """Return positions of layers that are planned together; by default one by one."""
        return [[i] for i in range(len(layers))]

    def check(self, layers: Layers, budget: Budget, allocation: Allocation) -> None:
        """Check a budget before anything heavy; layers may lie on the meta device.

        Raises:
            InputError: a setting cannot be used with these layers.
            OutOfReach: the method is swept by another budget, cannot follow the allocation, or
                cannot reach the budget.
        """
        name = type(self).__name__
        if budget.quantity != self.budget.quantity:
            raise OutOfReach(
                f"{name} is swept by {self.budget.quantity}, not by {budget.quantity}; allowed: "
                f"{self.budget.choices}"
            )
        lists = ", or allocation=per_layer for shares of each layer"
        refused = {"any": False, "fixed": allocation.compares, "uniform": not allocation.uniform}
        if refused[self.allocations]:
            raise OutOfReach(
                f"allocation {allocation} counts experts, and {name} keeps them all; use "
                f"allocation=uniform{lists if self.allocations == 'fixed' else ''}"
            )
        if allocation.searches and self.driver == "sequential":
            raise OutOfReach(
                f"allocation {allocation} plans many times, and {name} measures every scope anew "
                "each time; use allocation=uniform or global, or a setting that measures once"
            )
        self.allocate(layers, None, budget, allocation)

    def plan(
        self,
        layers: Layers,
        statistics: StatisticSet,
        budget: Budget,
        allocation: Allocation,
        hooks: PlanHooks = NO_HOOKS,
    ) -> Plan:
        """Return the plan for a budget that was checked; its lineage has counts and notes."""
        counts = self.allocate(layers, statistics, budget, allocation)
        plan, notes = Plan(), list[str]()
        for scope in hooks.progress(self.scopes(layers)):
            chosen = [layers[i] for i in scope]
            if hooks.remeasure is not None and self.driver == "sequential":
                statistics = hooks.remeasure(plan, chosen)
            views = [statistics.of(layer, self.requires) for layer in chosen]
            decisions = self.decide(chosen, views, [counts[i] for i in scope])
            notes += [note for decision in decisions for note in decision.notes]
            plan = extended(plan, decisions)
        return dataclasses.replace(plan, lineage=with_notes({"counts": counts}, notes))


def make_plan(  # noqa: PLR0913
    compressor: Compressor,
    layers: Layers,
    statistics: StatisticSet,
    budget: Budget,
    allocation: Allocation,
    remeasure: Remeasure | None = None,
    progress: Progress = NO_HOOKS.progress,
    fitness: Fitness | None = None,
) -> Plan:
    """Check a budget and return the plan of a compressor; a budget of 0 gives the empty plan.

    Layers and statistics are of the original model; for the hooks see `PlanHooks`; `fitness` is for
    an allocation or a method that searches. The lineage of the plan says what was asked for
    (`removed`), how many units each layer got (`counts`) and what integers made of it (`achieved`,
    the removed share of the bytes of routed experts).

    Raises:
        InputError: the budget cannot be reached.
    """
    lineage: dict[str, Any] = {"compressor": repr(compressor), "removed": budget.removed}
    lineage["allocation"] = repr(allocation)
    if budget.removed == 0:
        return Plan((), lineage)
    compressor.check(layers, budget, allocation)
    hooks = PlanHooks(remeasure, progress, fitness)

    def judge(kept: tuple[int, ...]) -> float:
        if fitness is None:
            raise InputError(f"allocation {allocation} judges students on text, and there is none")
        return fitness(compressor.plan(layers, statistics, budget, PerLayer(kept), hooks))

    shares = allocation.with_fitness(judge)
    plan = compressor.plan(layers, statistics, budget, shares, hooks)
    plan.validate(layers)
    lineage |= shares.lineage()
    dense = sum(dense_numbers(layer) for layer in layers)
    lineage["achieved"] = 1 - plan.stored_bits(layers, 16) / (16 * dense)
    return dataclasses.replace(plan, lineage={**lineage, **plan.lineage})


def extended(plan: Plan, decisions: Sequence[Decision]) -> Plan:
    """Return the plan with further decisions, their tensors named `layers.<index>.<name>`."""
    tensors = {
        f"layers.{decision.plan.layer}.{name}": tensor.cpu()
        for decision in decisions
        for name, tensor in decision.tensors.items()
    }
    layers = (*plan.layers, *(decision.plan for decision in decisions))
    return dataclasses.replace(plan, layers=layers, tensors={**plan.tensors, **tensors})


def with_notes(lineage: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """Return the lineage with what a user should know, where there is something."""
    return {**lineage, "notes": list(notes)} if notes else dict(lineage)


def untouched(layer: MoELayer, spec: BankSpec) -> LayerPlan:
    """Return the plan that stores experts anew, one for each row, and keeps the router."""
    everyone = tuple(range(layer.num_experts))
    return LayerPlan(layer.index, everyone, everyone, "untouched", spec)
