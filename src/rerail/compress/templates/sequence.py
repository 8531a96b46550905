"""Chains: a second compressor plans on the layers that the first one would leave.

Nothing is applied to the model. The second stage sees light views of its layers: new modules that
share every Parameter, with the first stage's router rows and banks. It reads the statistics of the
original model, cut to the slots that stay: nothing is measured between the stages.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rerail.compress.base import Compressor, ScopePlan, Staged, make_plan
from rerail.errors import InputError, OutOfReach
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation, Uniform
from rerail.plan.apply import apply_to_layers
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.statistic import LayerStatistics, Statistic, StatisticSet


@dataclass(frozen=True, kw_only=True)
class Chain(Staged):
    """Two stages that share a ratio: the second brings what the first left to the whole ratio.

    The allocation is the first stage's; the second takes the same share of each layer that it is
    given. A method may hand over more than layers and statistics: `prepared`.

    Attributes:
        first, second: the stages.
        share: how much of what is removed the first stage removes; 0 and 1 leave one stage alone.
    """

    first: Compressor
    second: Compressor
    share: float = 0.5

    paradigm: ClassVar[str] = "sequence"

    def __post_init__(self) -> None:
        """Check the interval."""
        if not 0 <= self.share <= 1:
            raise InputError(f"compressor.share={self.share} is outside [0, 1]")

    def prepared(
        self, layers: Sequence[MoELayer], views: Sequence[LayerStatistics], plan: Plan
    ) -> Compressor:
        """Return the second stage once the first is planned; by default it is as it was.

        Args:
            layers: of the original model.
            views: what the first stage requires of each of them.
            plan: of the first stage.
        """
        return self.second

    @property
    def requires(self) -> tuple[Statistic, ...]:
        """What both stages read."""
        return tuple(dict.fromkeys([*self.first.requires, *self.second.requires]))

    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """Check both stages, the second as if the first could remove its share exactly."""
        first = Ratio(ratio.removed * self.share)
        self.first.check(layers, first, allocation)
        if self.share == 1:
            return
        try:
            rest = Ratio(1 - (1 - ratio.removed) / (1 - first.removed))
            self.second.check(layers, rest, Uniform())
        except OutOfReach as error:
            raise OutOfReach(
                f"once the first stage has removed {first.removed:.4g}, {error} for the second "
                "stage; allowed: another ratio, or another compressor.share"
            ) from error

    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Ratio,
        allocation: Allocation,
    ) -> list[int]:
        """Return the first stage's shares."""
        first = Ratio(ratio.removed * self.share)
        return self.first.allocate(layers, statistics, first, allocation)

    def plan_scope(
        self,
        layers: Sequence[MoELayer],
        statistics: Sequence[LayerStatistics],
        shares: Sequence[int],
    ) -> ScopePlan:
        """Decide about the first stage of one scope."""
        return self.first.plan_scope(layers, statistics, shares)

    def staged(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Any,
        allocation: Allocation,
    ) -> Plan:
        """Return the first plan with the second behind it; its lineage speaks of both."""
        wanted = Ratio(ratio.removed * self.share)
        plan = make_plan(self.first, layers, statistics, wanted, allocation)
        views = [statistics.of(layer, self.first.requires) for layer in layers]
        second = self.prepared(layers, views, plan)
        students = student_layers(layers, plan)
        left = sum(la.expert_size * la.num_experts for la in students)
        rest = max(0.0, 1 - sum(ratio.numbers_kept(layer) for layer in layers) / left)
        if self.share < 1:
            held = restricted(statistics, second.requires, layers, students, plan)
            then = make_plan(second, students, held, Ratio(rest), Uniform())
            plan = dataclasses.replace(plan, then=then if then.layers else None)
        dense = sum(la.expert_size * la.num_experts for la in layers)
        lineage = {**plan.lineage, "compressor": repr(self), "removed": ratio.removed}
        lineage |= {"achieved": 1 - plan.stored(layers) / dense}
        notes = [n for stage in plan.stages for n in stage.lineage.get("notes", ())]
        lineage |= {"notes": notes} if notes else {}
        return dataclasses.replace(plan, lineage=lineage)


def student_layers(layers: Sequence[MoELayer], plan: Plan) -> tuple[MoELayer, ...]:
    """Return the layers of a plan's student; they share every Parameter that it leaves as it is.

    Raises:
        InputError: several router rows share one stored expert, which a second stage would store
            once for each of them.
    """
    for part in plan.layers:
        if len(set(part.slots)) < len(part.slots):
            raise InputError(
                f"layer {part.layer}: {len(part.slots)} router rows share "
                f"{len(set(part.slots))} stored experts, and a second stage stores one a row; "
                "let the first stage keep one row an expert (router=slice)"
            )
    copies = tuple(MoELayer(la.index, la.name, _shared(la.block)) for la in layers)
    apply_to_layers(copies, plan)
    return copies


def _shared(block: torch.nn.Module) -> torch.nn.Module:
    memo: dict[int, Any] = {id(t): t for t in [*block.parameters(), *block.buffers()]}
    return copy.deepcopy(block, memo)


def restricted(
    statistics: StatisticSet,
    required: Sequence[Statistic],
    layers: Sequence[MoELayer],
    students: Sequence[MoELayer],
    plan: Plan,
) -> StatisticSet:
    """Return the original model's statistics as a student's layers have them.

    The axes of a statistic that count slots are those along which its empty tensors differ.
    """
    kept = {part.layer: torch.tensor(part.kept) for part in plan.layers}
    held: dict[int, dict[str, torch.Tensor]] = {}
    for layer, student in zip(layers, students, strict=True):
        view = statistics.of(layer, required)
        held[layer.index] = {}
        for statistic in required:
            tensor = view[statistic]
            with torch.device("meta"):
                shapes = [statistic.empty(one).shape for one in (layer, student)]
            for axis, (before, after) in enumerate(zip(*shapes, strict=True)):
                if before != after:
                    tensor = tensor.index_select(axis, kept[layer.index].to(tensor.device))
            held[layer.index][statistic.name] = tensor
    return StatisticSet(held, statistics.lineage)
