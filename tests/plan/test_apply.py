import pytest
import torch

from families import CONFIGS, tiny, tokens
from rerail.compress.base import make_plan
from rerail.errors import InputError
from rerail.experts.base import BankSpec
from rerail.methods.hc_smoe import HCSMoE
from rerail.methods.reap import MomentScore
from rerail.moe.model import MoEModel
from rerail.plan.allocation import PerLayer, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import LayerPlan, Plan
from rerail.plan.sizes import Sizes
from rerail.statistics.collect import collect


def part(layer: int, kept: tuple[int, ...]) -> LayerPlan:
    members = tuple(((layer, e, 1.0),) for e in kept)
    bank = BankSpec("dense", len(kept), members)
    return LayerPlan(layer, kept, tuple(range(len(kept))), "slice", bank)


COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def counts(*owners: object) -> set[int]:
    """Return the numbers of experts that configs or modules claim."""
    claimed = {getattr(owner, name, None) for owner in owners for name in COUNTS}
    return {count for count in claimed if isinstance(count, int)}


def module_counts(model: MoEModel) -> set[int]:
    """Return the counts of all modules, but for the stock experts that a bank took the place of."""
    modules = model.model.named_modules()
    return counts(*(module for name, module in modules if not name.endswith("shell")))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_uniform_slice_is_written_into_the_students_config_only(family: str) -> None:
    teacher = tiny(family)
    before = teacher.config.to_dict()
    student = apply_plan(teacher, Plan(tuple(part(i, (0, 1, 2, 4, 5, 6)) for i in (0, 1))))
    assert counts(student.config) == {6}
    assert counts(teacher.config) == {8}
    assert {layer.num_experts for layer in student.layers} == module_counts(student) == {6}
    assert module_counts(teacher) == {8}
    assert teacher.config.to_dict() == before


def test_unequal_layers_leave_the_count_and_still_run() -> None:
    teacher = tiny("qwen3_moe")
    student = apply_plan(teacher, Plan((part(1, (1, 3, 4)),)))
    assert counts(student.config) == {8}
    assert [layer.num_experts for layer in student.layers] == [8, 3]
    assert torch.isfinite(student.model(tokens()).logits).all()


def test_a_layer_that_is_not_named_stays_as_it_is() -> None:
    teacher = tiny("qwen3_moe")
    student = apply_plan(teacher, Plan((part(1, (1, 3, 4)),)))
    assert type(student.layers[0].experts) is type(teacher.layers[0].experts)
    assert student.layers[0].router_rows is teacher.layers[0].router_rows


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    teacher = tiny("qwen3_moe")
    modules = list(teacher.model.modules())
    with pytest.raises(InputError, match="plan names layer 2"):
        apply_plan(teacher, Plan((part(0, (1, 2)), part(2, (1, 2)))))
    assert list(teacher.model.modules()) == modules


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = tokens(4, 16)
    return [(ids, torch.ones_like(ids, dtype=torch.bool))]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("router", ["slice", "mask"])
def test_a_second_method_works_on_the_student_of_the_first(family: str, router: str) -> None:
    teacher = tiny(family)
    first = MomentScore(router=router)
    filled = collect(teacher, batches(), first.requires)
    plan = make_plan(first, teacher.layers, filled, Ratio(0.25), Uniform())
    student = apply_plan(teacher, plan)
    second = HCSMoE()
    filled = collect(student, batches(), second.requires)
    again = make_plan(second, student.layers, filled, Ratio(0.5), Uniform())
    twice = apply_plan(student, again)
    assert Sizes.predicted(student, again, 2) == Sizes.of(twice, 2)
    assert [len(layer.router_rows) for layer in twice.layers] == [6 if router == "slice" else 8] * 2
    stored = 3 if router == "slice" else 4
    assert Sizes.of(twice, 2).routed == 2 * stored * teacher.layers[0].expert_size
    assert torch.isfinite(twice.model(tokens()).logits).all()


def test_layers_may_keep_different_numbers() -> None:
    teacher, method = tiny("qwen3_moe"), MomentScore()
    filled = collect(teacher, batches(), method.requires)
    plan = make_plan(method, teacher.layers, filled, Ratio(0.5), PerLayer((3, 7)))
    student = apply_plan(teacher, plan)
    assert [layer.num_experts for layer in student.layers] == [3, 7]
    assert Sizes.predicted(teacher, plan, 2) == Sizes.of(student, 2)
    assert plan.lineage["achieved"] == pytest.approx(6 / 16)
