"""What a method is: a frozen dataclass that turns statistics into a plan."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Budget, Ratio
from rerail.plan.plan import LayerPlan, Plan
from rerail.statistics.statistic import LayerStatistics, Statistic, StatisticSet

Scopes = list[list[int]]
Progress = Callable[[Scopes], Iterable[list[int]]]
# statistics of some layers, measured on the student of the plan so far
Remeasure = Callable[[Plan, Sequence[MoELayer]], StatisticSet]


@dataclass(frozen=True)
class ScopePlan:
    """The decision about one scope, with the tensors it solved for, named `<layer>.<name>`.

    Notes say what a user should know (a fallback that was taken); they go into the lineage.
    """

    layers: tuple[LayerPlan, ...]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """A method. Its fields are its hyper-parameters; it touches no module, file or logger.

    Attributes:
        paradigm, paper: what it is and where it is from.
        budget: what it is swept by.
        driver: `one_shot` plans from the original model's statistics; `sequential` measures each
            scope on the model whose earlier scopes are compressed already.
    """

    paradigm: ClassVar[str]
    paper: ClassVar[str]
    budget: ClassVar[type] = Ratio
    driver: ClassVar[Literal["one_shot", "sequential"]] = "one_shot"

    @property
    @abstractmethod
    def requires(self) -> tuple[Statistic, ...]:
        """The statistics that planning reads, all of them and no others."""

    @abstractmethod
    def check(self, layers: Sequence[MoELayer], ratio: Any, allocation: Allocation) -> None:
        """Raise InputError where the ratio cannot be reached; layers may lie on the meta device."""

    @abstractmethod
    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Any,
        allocation: Allocation,
    ) -> list[int]:
        """Return each layer's share, in the template's unit (experts kept, or numbers stored)."""

    @abstractmethod
    def plan_scope(
        self,
        layers: Sequence[MoELayer],
        statistics: Sequence[LayerStatistics],
        shares: Sequence[int],
    ) -> ScopePlan:
        """Decide about one scope of layers."""

    def scopes(self, layers: Sequence[MoELayer]) -> Scopes:
        """Return positions of layers that are planned together; by default one by one."""
        return [[i] for i in range(len(layers))]


class Decision(NamedTuple):
    """The decision about one layer, the tensors it solved for by short name, and notes."""

    plan: LayerPlan
    tensors: Mapping[str, Tensor] = MappingProxyType({})
    notes: tuple[str, ...] = ()


class LayerWise(Compressor):
    """A compressor that decides about every layer on its own."""

    @abstractmethod
    def decide(self, layer: MoELayer, statistics: LayerStatistics, share: int) -> Decision | None:
        """Decide about one layer; None leaves it as it is."""

    def plan_scope(
        self,
        layers: Sequence[MoELayer],
        statistics: Sequence[LayerStatistics],
        shares: Sequence[int],
    ) -> ScopePlan:
        """Decide layer by layer."""
        made = [
            one
            for each in zip(layers, statistics, shares, strict=True)
            if (one := self.decide(*each)) is not None
        ]
        return ScopePlan(
            tuple(one.plan for one in made),
            {f"{one.plan.layer}.{n}": t for one in made for n, t in one.tensors.items()},
            tuple(note for one in made for note in one.notes),
        )


def untouched(layer: MoELayer, spec: BankSpec) -> LayerPlan:
    """Return the plan that stores experts anew, one for each row, and keeps the router."""
    everyone = tuple(range(layer.num_experts))
    return LayerPlan(layer.index, everyone, everyone, "untouched", spec)


def check(
    compressor: Compressor, layers: Sequence[MoELayer], ratio: Budget, allocation: Allocation
) -> None:
    """Check a budget before anything heavy.

    Raises:
        InputError: the compressor is swept by another budget, or cannot reach this one.
    """
    if not isinstance(ratio, compressor.budget):
        raise OutOfReach(
            f"{type(compressor).__name__} is swept by {compressor.budget.__name__.lower()}, not by "
            f"{type(ratio).__name__.lower()}; {_HOW[compressor.budget.__name__]}"
        )
    compressor.check(layers, ratio, allocation)


_HOW = {
    "Ratio": "allowed: ratio=half, quarter ... or ratio.removed=0.3",
    "Bits": "allowed: ratio=bits8, bits4, bits3, bits2",
    "Skip": "allowed: skip=rule, skip=quarter ... or skip.share=0.3",
}


def make_plan(  # noqa: PLR0913
    compressor: Compressor,
    layers: Sequence[MoELayer],
    statistics: StatisticSet,
    ratio: Budget,
    allocation: Allocation,
    remeasure: Remeasure | None = None,
    progress: Progress = lambda scopes: scopes,
) -> Plan:
    """Return the plan of a compressor; ratio 0 gives the empty plan.

    Its lineage says what was asked for (`removed`) and what integers made of it (`achieved`, the
    removed share of the bytes of routed experts).

    Args:
        compressor: the method.
        layers: of the original model.
        statistics: on the original model.
        ratio: what is asked for.
        allocation: how layers share it.
        remeasure: gives a sequential method its statistics scope by scope; without it, it plans
            from the original model's.
        progress: wraps the scopes, to show a bar.

    Raises:
        InputError: the ratio cannot be reached.
    """
    lineage: dict[str, Any] = {"compressor": repr(compressor), "removed": ratio.removed}
    lineage["allocation"] = repr(allocation)
    if ratio.removed == 0:
        return Plan((), lineage)
    check(compressor, layers, ratio, allocation)
    if isinstance(compressor, Staged):
        return compressor.staged(layers, statistics, ratio, allocation)
    shares = compressor.allocate(layers, statistics, ratio, allocation)
    plan, notes = Plan(), list[str]()
    for scope in progress(compressor.scopes(layers)):
        chosen = [layers[i] for i in scope]
        if remeasure is not None and compressor.driver == "sequential":
            statistics = remeasure(plan, chosen)
        views = [statistics.of(layer, compressor.requires) for layer in chosen]
        planned = compressor.plan_scope(chosen, views, [shares[i] for i in scope])
        notes += planned.notes
        tensors = {f"layers.{name}": t.cpu() for name, t in planned.tensors.items()}
        plan = Plan((*plan.layers, *planned.layers), lineage, {**plan.tensors, **tensors})
    plan.validate(layers)
    dense = sum(layer.expert_size * layer.num_experts for layer in layers)
    achieved = 1 - plan.stored_bits(layers, 16) / (16 * dense)
    lineage |= {"shares": shares, "achieved": achieved} | ({"notes": notes} if notes else {})
    return dataclasses.replace(plan, lineage=lineage)


class Staged(Compressor):
    """A compressor whose plan has several stages."""

    @abstractmethod
    def staged(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Budget,
        allocation: Allocation,
    ) -> Plan:
        """Return the chain of plans."""
