import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import rerail.methods
from families import tiny, tokens
from rerail.compress.base import Compressor, Decision, make_plan
from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec
from rerail.methods.camera import Camera
from rerail.methods.conmoe import ConMoE
from rerail.methods.m_smoe import MSMoE
from rerail.methods.mobe import MoBE
from rerail.methods.moe_i2 import MoEI2
from rerail.methods.moe_svd import MoESVD
from rerail.methods.mone import MoNE
from rerail.methods.naee import NAEE
from rerail.methods.naee_skip import NAEESkip
from rerail.methods.pmq import PMQ
from rerail.methods.reap import MomentScore
from rerail.methods.rtn import RTN
from rerail.moe.model import MoEModel
from rerail.plan.allocation import Allocation, GlobalScore, PerLayer, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Bits, Budget, Ratio, Skip
from rerail.plan.plan import LayerPlan
from rerail.plan.sizes import Sizes
from rerail.statistics.statistic import StatisticSet, UndeclaredError


@dataclass(frozen=True, kw_only=True)
class Window(Compressor):
    """Aliases every slot of a scope of layers to the first experts of its first layer."""

    width: int = 2

    paradigm: ClassVar[str] = "pruning"
    paper: ClassVar[str] = "none"

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


def subclasses(parent: type[Compressor]) -> list[type[Compressor]]:
    return [c for child in parent.__subclasses__() for c in (child, *subclasses(child))]


def test_a_method_is_one_template_away_from_the_compressor() -> None:
    for module in pkgutil.iter_modules(rerail.methods.__path__):
        importlib.import_module(f"rerail.methods.{module.name}")
    ours = [c for c in subclasses(Compressor) if c.__module__.startswith("rerail.")]
    assert len(ours) > 30
    for method in ours:
        chain = [c for c in method.__mro__ if issubclass(c, Compressor)]
        assert len(chain) <= 3, chain


BUDGETS: list[tuple[Compressor, Budget, Allocation]] = [
    (MomentScore(guard="super"), Ratio(0.5), GlobalScore()),
    (NAEE(), Ratio(0.5), GlobalScore()),
    (MSMoE(router="pooled"), Ratio(0.5), GlobalScore()),
    (ConMoE(window=2), Ratio(0.5), GlobalScore()),
    (MoNE(), Ratio(0.5), PerLayer((3, 5))),
    (Camera(), Ratio(0.5), PerLayer((3, 5))),
    (MoBE(), Ratio(0.5), PerLayer((3, 5))),
    (MoESVD(dense_layers=1), Ratio(0.4), Uniform()),
    (MoEI2(), Ratio(0.5), Uniform()),
    (RTN(), Bits(4), Uniform()),
    (PMQ(quantiser=RTN()), Bits(2), Uniform()),
    (NAEESkip(), Skip(), Uniform()),
]


@pytest.mark.parametrize(("compressor", "budget", "allocation"), BUDGETS)
def test_a_check_is_an_allocation_without_statistics_on_layers_without_weights(
    compressor: Compressor, budget: Budget, allocation: Allocation
) -> None:
    teacher = tiny("qwen3_moe")
    with torch.device("meta"):
        empty = MoEModel(type(teacher.model)(teacher.config)).layers
    compressor.check(empty, budget, allocation)
    counts = compressor.allocate(empty, None, budget, allocation)
    assert counts == compressor.allocate(teacher.layers, None, budget, allocation)
    assert all(isinstance(count, int) and count >= 0 for count in counts)


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
