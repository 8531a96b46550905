"""Drivers: how a method gets its statistics while it plans."""

from collections.abc import Callable, Sequence

from rerail.compress.base import Remeasure
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.apply import apply_plan
from rerail.plan.plan import Plan
from rerail.statistics.collect import Batch, Progress, collect
from rerail.statistics.segments import OriginalSegments
from rerail.statistics.statistic import Statistic, StatisticSet, join_sets
from rerail.statistics.token_sample import OriginalTokenSample


def sequential(
    teacher: MoEModel,
    batches: Sequence[Batch],
    statistics: Sequence[Statistic],
    bar: Callable[[str], Progress],
) -> Remeasure:
    """Return what measures the next layers on the student of the plan so far.

    Every scope costs one forward of the text up to its last layer, so that all of them together
    cost about half as many full forwards as there are scopes. What stays the original model's is
    measured once.
    """
    original = [s for s in statistics if isinstance(s, OriginalTokenSample | OriginalSegments)]
    moving = [s for s in statistics if s not in original]
    fixed = StatisticSet()
    if original:
        fixed = collect(teacher, batches, original, bar("statistics of the original model"))

    def remeasure(plan: Plan, layers: Sequence[MoELayer]) -> StatisticSet:
        student = apply_plan(teacher, plan) if plan.layers else teacher
        indices = [layer.index for layer in layers]
        label = f"statistics of layers {indices[0]}-{indices[-1]}"
        measured = collect(student, batches, moving, bar(label), layers=indices)
        return join_sets([measured, fixed])

    return remeasure
