"""Sequences: a second compressor plans on the layers that the first one would leave.

Nothing is applied to the model. The second stage sees light views of its layers: new modules that
share every Parameter, with the first stage's router rows and banks. It reads the statistics of the
original model, cut to the slots that stay: nothing is measured between the stages.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rerail.compress.base import (
    NO_HOOKS,
    Compressor,
    Layers,
    PlanHooks,
    Statistics,
    make_plan,
    with_notes,
)
from rerail.errors import InputError, OutOfReach
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation, Uniform
from rerail.plan.apply import apply_to_layers
from rerail.plan.budget import Budget, Ratio, dense_numbers, numbers_kept
from rerail.plan.plan import Plan
from rerail.statistics.statistic import LayerStatistics, Statistic, StatisticSet

_ORDER = ("no", "yes", "never")


@dataclass(frozen=True, kw_only=True)
class TwoStages(Compressor):
    """Two stages that share a ratio: the second brings what the first left to the whole ratio.

    The allocation and the counts are the first stage's; the second takes the same share of each
    layer that it is given.

    Attributes:
        first, second: the stages.
        share: how much of what is removed the first stage removes; 0 and 1 leave one stage alone.
    """

    first: Compressor
    second: Compressor
    share: float = 0.5

    paradigm: ClassVar[str] = "sequence"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"compressor.share={self.share} is outside [0, 1]")
        for stage in (self.first, self.second):
            if stage.driver == "sequential":
                raise InputError(
                    f"{type(stage).__name__} measures one layer at a time, and both stages are "
                    "planned from the original model's statistics; allowed: methods that do not"
                )

    def second_stage(
        self, layers: Layers, views: Sequence[LayerStatistics], plan: Plan
    ) -> Compressor:
        """Return the second stage once the first is planned; by default it is as it was.

        Args:
            layers: of the original model.
            views: what both stages require of each of them.
            plan: of the first stage.
        """
        return self.second

    @property
    def written_out(self) -> Literal["no", "yes", "never"]:
        stages = (self.first.written_out, self.second.written_out)
        return stages[self.share < 1] if self.share in (0, 1) else max(stages, key=_ORDER.index)

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return tuple(dict.fromkeys([*self.first.requires, *self.second.requires]))

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Return the first stage's counts, once the second is known to reach its part."""
        first = self._first_ratio(budget)
        if statistics is None:
            self._check_second(layers, budget, first)
        return self.first.allocate(layers, statistics, first, allocation)

    def _first_ratio(self, budget: Budget) -> Ratio:
        assert budget.removed is not None
        return Ratio(budget.removed * self.share)

    def _check_second(self, layers: Layers, budget: Budget, first: Ratio) -> None:
        """Check the second stage as if the first could remove its share exactly."""
        if self.share == 1 or budget.removed is None:
            return
        try:
            rest = Ratio(1 - (1 - budget.removed) / (1 - first.removed))
            self.second.check(layers, rest, Uniform())
        except OutOfReach as error:
            raise OutOfReach(
                f"once the first stage has removed {first.removed:.4g}, {error} for the second "
                "stage; allowed: another ratio, or another compressor.share"
            ) from error

    def plan(
        self,
        layers: Layers,
        statistics: StatisticSet,
        budget: Budget,
        allocation: Allocation,
        hooks: PlanHooks = NO_HOOKS,
    ) -> Plan:
        """Return the first plan with the second behind it; its lineage has the notes of both."""
        first = self._first_ratio(budget)
        plan = Plan()
        if first.removed > 0:
            plan = self.first.plan(layers, statistics, first, allocation, hooks)
        views = [statistics.of(layer, self.requires) for layer in layers]
        second = self.second_stage(layers, views, plan)
        students = student_layers(layers, plan)
        if self.share < 1:
            allowed = sum(numbers_kept(dense_numbers(la), budget.removed or 0.0) for la in layers)
            rest = Ratio(max(0.0, 1 - allowed / sum(dense_numbers(la) for la in students)))
            cut = restricted(statistics, second.requires, layers, students, plan)
            then = make_plan(second, students, cut, rest, Uniform())
            plan = dataclasses.replace(plan, then=then if then.layers else None)
        notes = [note for stage in plan.stages for note in stage.lineage.get("notes", ())]
        return dataclasses.replace(plan, lineage=with_notes(plan.lineage, notes))


def student_layers(layers: Layers, plan: Plan) -> tuple[MoELayer, ...]:
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
    copies = []
    for layer in layers:
        tensors = [*layer.block.parameters(), *layer.block.buffers()]
        shared = copy.deepcopy(layer.block, {id(t): t for t in tensors})
        copies.append(MoELayer(layer.index, layer.name, shared))
    apply_to_layers(copies, plan)
    return tuple(copies)


def restricted(
    statistics: StatisticSet,
    required: Sequence[Statistic],
    layers: Layers,
    students: Sequence[MoELayer],
    plan: Plan,
) -> StatisticSet:
    """Return the original model's statistics as a student's layers have them.

    The axes of a statistic that count slots are those along which its empty tensors differ.
    """
    kept = {part.layer: torch.tensor(part.kept) for part in plan.layers}
    cut: dict[int, dict[str, torch.Tensor]] = {}
    for layer, student in zip(layers, students, strict=True):
        view = statistics.of(layer, required)
        cut[layer.index] = {}
        for statistic in required:
            tensor = view[statistic]
            with torch.device("meta"):  # shapes only, without memory
                shapes = [statistic.empty(which).shape for which in (layer, student)]
            for axis, (before, after) in enumerate(zip(*shapes, strict=True)):
                if before != after:
                    tensor = tensor.index_select(axis, kept[layer.index].to(tensor.device))
            cut[layer.index][statistic.name] = tensor
    return StatisticSet(cut)
