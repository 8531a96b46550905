"""What a method is: a frozen dataclass that turns statistics into a plan."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rerail.moe.layer import MoELayer
from rerail.plan.plan import LayerPlan, Plan
from rerail.plan.ratio import Allocation, Ratio
from rerail.stats.statistic import LayerStatistics, Statistic, StatisticSet


@dataclass(frozen=True)
class ScopePlan:
    """The decision about one scope, with the tensors it solved for, named `<layer>.<name>`."""

    layers: tuple[LayerPlan, ...]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """A method. Its fields are its hyper-parameters; it touches no module, file or logger."""

    paradigm: ClassVar[str]
    paper: ClassVar[str]

    @property
    @abstractmethod
    def requires(self) -> tuple[Statistic, ...]:
        """The statistics that planning reads, all of them and no others."""

    @abstractmethod
    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """Raise OutOfReach where the ratio cannot be reached; layers may lie on the meta device."""

    @abstractmethod
    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Ratio,
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

    def scopes(self, layers: Sequence[MoELayer]) -> list[list[int]]:
        """Return positions of layers that are planned together; by default one by one."""
        return [[i] for i in range(len(layers))]


def make_plan(
    compressor: Compressor,
    layers: Sequence[MoELayer],
    statistics: StatisticSet,
    ratio: Ratio,
    allocation: Allocation,
) -> Plan:
    """Return the one-shot plan of a compressor; ratio 0 gives the empty plan.

    Its lineage says what was asked for (`removed`) and what integers made of it (`achieved`, the
    removed share of routed experts).

    Raises:
        OutOfReach: the ratio cannot be reached.
        InputError: the plan does not fit the model.
    """
    lineage: dict[str, Any] = {
        "compressor": repr(compressor),
        "removed": ratio.removed,
        "allocation": repr(allocation),
    }
    if ratio.removed == 0:
        return Plan((), lineage)
    compressor.check(layers, ratio, allocation)
    shares = compressor.allocate(layers, statistics, ratio, allocation)
    parts: list[LayerPlan] = []
    tensors: dict[str, Tensor] = {}
    for scope in compressor.scopes(layers):
        chosen = [layers[i] for i in scope]
        views = [statistics.of(layer, compressor.requires) for layer in chosen]
        planned = compressor.plan_scope(chosen, views, [shares[i] for i in scope])
        parts += planned.layers
        tensors |= {f"layers.{name}": t for name, t in planned.tensors.items()}
    plan = Plan(tuple(parts), lineage, tensors)
    plan.validate(layers)
    dense = sum(layer.expert_size * layer.num_experts for layer in layers)
    achieved = 1 - plan.stored(layers) / dense
    return dataclasses.replace(plan, lineage=lineage | {"shares": shares, "achieved": achieved})
