from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import Compressor, Decision, make_plan
from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec
from rerail.methods.reap import MomentScore
from rerail.plan.allocation import Uniform, experts_kept
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import LayerPlan
from rerail.plan.sizes import Sizes
from rerail.statistics.statistic import StatisticSet, UndeclaredError


@dataclass(frozen=True, kw_only=True)
class Window(Compressor):
    """Aliases every slot of a scope of layers to the first experts of its first layer."""

    width: int = 2

    paradigm: ClassVar[str] = "pruning"
    paper: ClassVar[str] = "none"

    @property
    def requires(self) -> tuple[()]:
        return ()

    def allocate(self, layers: Any, statistics: Any, budget: Ratio, allocation: Any) -> list[int]:
        return experts_kept(layers, budget, allocation, [1] * len(layers))

    def scopes(self, layers: Sequence[Any]) -> list[list[int]]:
        numbers = list(range(len(layers)))
        return [numbers[i : i + self.width] for i in range(0, len(numbers), self.width)]

    def decide(self, layers: Any, statistics: Any, counts: Sequence[int]) -> list[Decision]:
        pool = sum(counts)
        members = tuple(((layers[0].index, e, 1.0),) for e in range(pool))
        spec = BankSpec("dense", pool, members)
        everyone = tuple(range(8))
        slots = tuple(e % pool for e in everyone)
        parts = [LayerPlan(la.index, everyone, slots, "untouched", spec) for la in layers]
        return [Decision(part) for part in parts]


def test_a_scope_of_several_layers_counts_its_pool_once() -> None:
    teacher = tiny("qwen3_moe", num_hidden_layers=3)
    plan = make_plan(Window(), teacher.layers, StatisticSet(), Ratio(0.75), Uniform())
    student = apply_plan(teacher, plan)
    assert [part.bank.stored for part in plan.layers] == [4, 4, 2]
    assert Sizes.predicted(teacher, plan, 2) == Sizes.of(student, 2)
    assert plan.lineage["achieved"] == 0.75
    for old, new in ((0, 0), (0, 1), (2, 2)):
        for a, b in zip(teacher.layers[old].stack(), student.layers[new].stack(), strict=True):
            assert torch.equal(a[0], b[0])
    assert torch.isfinite(student.model(tokens()).logits).all()


def test_the_lineage_says_how_a_plan_came_about() -> None:
    plan = make_plan(Window(), tiny("qwen3_moe").layers, StatisticSet(), Ratio(0.55), Uniform())
    assert plan.lineage["removed"] == 0.55
    assert plan.lineage["achieved"] == 0.5
    assert plan.lineage["counts"] == [4, 4]
    assert "Window(width=2)" in plan.lineage["compressor"]


def test_a_ratio_that_cannot_be_reached_is_refused_before_statistics_are_read() -> None:
    with pytest.raises(OutOfReach, match="allowed ratios"):
        make_plan(MomentScore(), tiny("qwen3_moe").layers, StatisticSet(), Ratio(0.9), Uniform())


@dataclass(frozen=True, kw_only=True)
class Forgetful(MomentScore):
    @property
    def requires(self) -> tuple[()]:
        return ()


def test_an_undeclared_statistic_cannot_be_read() -> None:
    held = {0: {"moment_g1_n1": torch.ones(8), "count": torch.ones(8)}}
    with pytest.raises(UndeclaredError):
        make_plan(Forgetful(), tiny("qwen3_moe").layers, StatisticSet(held), Ratio(0.5), Uniform())
