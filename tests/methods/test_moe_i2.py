"""MoE-I2 and chains: the split of the ratio, the ranks, and the views between the stages."""

import pytest
import torch

from families import CONFIGS, tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.router_rows import sliced
from rerail.compress.templates.sequence import TwoStages, restricted, student_layers
from rerail.errors import InputError, OutOfReach
from rerail.methods.moe_i2 import InterExpert, IntraExpert, LossIncrease, MoEI2
from rerail.methods.reap import MomentScore
from rerail.methods.svd import WhitenedSVD
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio, dense_numbers, numbers_kept
from rerail.plan.plan import LayerPlan, Plan
from rerail.statistics.collect import collect
from rerail.statistics.moments import InputMoment, LogitGram
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, StatisticSet
from rerail.statistics.token_sample import TokenSample

SMALL = InterExpert(rows=64, population=8, generations=2)


def batches():
    ids = tokens(8, 16)
    return [(ids, torch.ones_like(ids, dtype=torch.bool))]


def made(family: str, compressor, removed: float = 0.5):
    teacher = tiny(family)
    filled = collect(teacher, batches(), compressor.requires)
    return teacher, make_plan(compressor, teacher.layers, filled, Ratio(removed), Uniform())


class Noted(WhitenedSVD):
    """A second stage that took a fallback."""

    def decide(self, layers, statistics, counts):
        notes = (f"layer {layers[0].index} fell back",)
        return [d._replace(notes=notes) for d in super().decide(layers, statistics, counts)]


def test_what_the_second_stage_has_to_say_is_said_by_the_whole_plan() -> None:
    _, plan = made("qwen3_moe", TwoStages(first=MomentScore(), second=Noted()))
    assert plan.lineage["notes"] == ["layer 0 fell back", "layer 1 fell back"]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_both_stages_together_meet_the_ratio(family: str, share: float) -> None:
    teacher, plan = made(family, MoEI2(first=SMALL, share=share))
    experts = sum(len(part.kept) for part in plan.layers)
    groups = teacher.layers[0].num_groups
    assert experts == 16 - int(16 * 0.5 * share) // groups * groups
    allowed = sum(numbers_kept(dense_numbers(layer), 0.5) for layer in teacher.layers)
    p, d = teacher.layers[0].intermediate_size, 16
    assert allowed - 2 * (3 * (p + d) + 1) < plan.stored(teacher.layers) <= allowed
    assert plan.lineage["removed"] == 0.5
    dense = sum(layer.expert_size * 8 for layer in teacher.layers)
    assert plan.lineage["achieved"] == 1 - plan.stored(teacher.layers) / dense
    for part in plan.then.layers:
        assert part.bank.each("gate") == part.bank.each("up") == part.bank.each("down")
        assert max(part.bank.each("gate")) < p * d / (p + d)
        assert min(part.bank.each("gate")) >= 1


def test_one_stage_alone() -> None:
    teacher, pruned = made("qwen3_moe", MoEI2(first=SMALL, share=1.0))
    assert pruned.then is None
    assert pruned.lineage["achieved"] == 0.5
    _, ranked = made("qwen3_moe", MoEI2(first=SMALL, share=0.0))
    assert ranked.layers == ()
    assert [len(part.slots) for part in ranked.then.layers] == [8, 8]
    assert ranked.stored(teacher.layers) <= 2 * numbers_kept(dense_numbers(teacher.layers[0]), 0.5)
    with pytest.raises(InputError, match=r"share=1\.5 is outside \[0, 1\]"):
        MoEI2(share=1.5)


def ranks(importance: list[float], alpha: float, numbers: int | None = None) -> list[int]:
    layer = tiny("qwen3_moe", intermediate_size=64, moe_intermediate_size=64).layers[0]
    held = {layer.index: torch.tensor(importance, dtype=torch.float64)}
    stage = IntraExpert(importance=held, alpha=alpha)
    budget = numbers or 8 * 7 * 3 * (64 + 16)
    return list(stage.sizes(layer, budget, LayerStatistics({}, ()))["gate"])


def test_ranks_follow_importance_and_sum_to_the_mean() -> None:
    importance = [0.1, 3.0, 0.7, 0.7, 2.0, 9.0, 0.01, 1.0]
    found = ranks(importance, 0.15)
    assert sum(found) == 8 * 7
    order = sorted(range(8), key=importance.__getitem__)
    assert [found[i] for i in order] == sorted(found)
    assert len(set(found)) > 2
    share = torch.tensor(importance).double() ** 0.15
    expected = share / share.sum() * 56
    assert (torch.tensor(found) - expected).abs().max() < 1
    assert ranks([i * 1000 for i in importance], 0.15) == found


def test_equal_importance_or_no_exponent_gives_equal_ranks() -> None:
    assert ranks([2.0] * 8, 0.15) == [7] * 8
    assert ranks([0.1, 3.0, 0.7, 0.7, 2.0, 9.0, 0.01, 1.0], 0.0) == [7] * 8
    assert ranks([0.0] * 8, 0.15) == [7] * 8


def test_no_rank_reaches_break_even() -> None:
    found = ranks([9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 1.0)
    assert found == [12, 7, 7, 6, 6, 6, 6, 6]  # 12 < 64 * 16 / (64 + 16) < 13


def test_importance_below_zero_counts_as_zero() -> None:
    below = ranks([-5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 0.15)
    assert below == ranks([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 0.15)
    assert 1 <= below[0] < min(below[1:])
    layer = tiny("qwen3_moe").layers[0]
    statistic = LossIncrease()
    view = LayerStatistics({statistic.name: torch.tensor([-1.0, 2.0])}, (statistic,))
    assert InterExpert(importance="loss").score(layer, view).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("importance", ["block", "loss"])
def test_ranks_use_the_whole_models_importance_of_the_survivors(importance: str) -> None:
    first = InterExpert(rows=64, population=8, generations=2, importance=importance)
    teacher, compressor = tiny("qwen3_moe"), MoEI2(first=first)
    filled = collect(teacher, batches(), compressor.requires)
    plan = make_plan(compressor, teacher.layers, filled, Ratio(0.5), Uniform())
    views = [filled.of(layer, first.requires) for layer in teacher.layers]
    prepared = compressor.second_stage(teacher.layers, views, plan)
    for part, layer, view in zip(plan.layers, teacher.layers, views, strict=True):
        expected = first.score(layer, view)[list(part.kept)]
        assert torch.equal(prepared.importance[layer.index], expected)
    if importance == "block":
        layer = teacher.layers[0]
        hidden = TokenSample.hidden(views[0][TokenSample(64)])
        without = layer.answer(hidden, (0, 1, 2, 4, 5, 6, 7)) - layer.answer(hidden)
        torch.testing.assert_close(
            first.score(layer, views[0])[3], without.norm().double(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("family", CONFIGS)
def test_views_answer_as_the_layers_of_the_applied_plan(family: str) -> None:
    teacher, plan = made(family, MoEI2(first=SMALL, share=1.0))
    before = {n: p.clone() for n, p in teacher.model.state_dict().items()}
    views, student = student_layers(teacher.layers, plan), apply_plan(teacher, plan)
    hidden = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    for view, layer, own in zip(views, student.layers, teacher.layers, strict=True):
        assert torch.equal(view.answer(hidden), layer.answer(hidden))
        assert view.num_experts == layer.num_experts < 8
        assert own.num_experts == 8
        assert view.experts.shell.down_proj is own.experts.down_proj
    after = teacher.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_statistics_are_cut_along_the_axes_that_count_slots() -> None:
    teacher = tiny("qwen3_moe")
    kept = {0: (0, 2, 3, 5, 7), 1: tuple(range(8))}
    plan = Plan(tuple(sliced(layer, kept[layer.index]) for layer in teacher.layers))
    wanted = (Count(), InputMoment(), LogitGram(), TokenSample(20))
    filled = collect(teacher, batches(), wanted)
    students = student_layers(teacher.layers, plan)
    found, own = restricted(filled, wanted, teacher.layers, students, plan).tensors, filled.tensors
    rows = list(kept[0])
    assert torch.equal(found[0]["count"], own[0]["count"][rows])
    assert torch.equal(found[0]["input_moment"], own[0]["input_moment"][rows])
    gram = LogitGram().name
    assert torch.equal(found[0][gram], own[0][gram][rows][:, rows])
    for name in (TokenSample(20).name,):
        assert torch.equal(found[0][name], own[0][name])
    assert all(torch.equal(found[1][name], own[1][name]) for name in own[1])


class ReapThenSVD(TwoStages):
    paper = "none"


def test_any_two_compressors_chain_and_the_second_sees_the_first_ones_student() -> None:
    chain = ReapThenSVD(first=MomentScore(), second=WhitenedSVD())
    assert set(chain.requires) == {*chain.first.requires, *chain.second.requires}
    teacher, plan = made("qwen3_moe", chain)
    assert [len(part.kept) for part in plan.layers] == [6, 6]
    student = apply_plan(teacher, Plan(plan.layers))
    filled = collect(teacher, batches(), chain.requires)
    held = restricted(filled, chain.second.requires, teacher.layers, student.layers, plan)
    rest = Ratio(1 - 0.5 / 0.75)
    alone = make_plan(chain.second, student.layers, held, rest, Uniform())
    assert alone.layers == plan.then.layers
    assert all(torch.equal(alone.tensors[n], t) for n, t in plan.then.tensors.items())
    logits = apply_plan(teacher, plan).model(tokens(2, 8)).logits
    assert torch.isfinite(logits).all()


def test_a_first_stage_whose_rows_share_experts_is_refused() -> None:
    chain = ReapThenSVD(first=MomentScore(router="mask"), second=WhitenedSVD())
    with pytest.raises(InputError, match="8 router rows share 6 stored experts"):
        made("qwen3_moe", chain)


def test_what_either_stage_cannot_reach_is_said_beforehand() -> None:
    layers = tiny("qwen3_moe").layers
    with pytest.raises(OutOfReach, match="allowed ratios"):
        MoEI2(share=1.0).check(layers, Ratio(0.9), Uniform())
    with pytest.raises(OutOfReach, match=r"removed 0\.09, layer 0 cannot .* for the second"):
        MoEI2(share=0.1).check(layers, Ratio(0.9), Uniform())
    MoEI2(share=0.5).check(layers, Ratio(0.75), Uniform())


def test_never_routed_experts_give_finite_ranks() -> None:
    teacher, compressor = tiny("qwen3_moe"), MoEI2(first=SMALL)
    for layer in teacher.layers:
        layer.router_rows[3:6] = 0
        layer.router_rows[3:6, 0] = -1e4
    filled = collect(teacher, batches(), compressor.requires)
    plan = make_plan(compressor, teacher.layers, filled, Ratio(0.5), Uniform())
    assert all(torch.isfinite(t).all() for t in plan.all_tensors().values())
    assert isinstance(plan.layers[0], LayerPlan)
    assert isinstance(filled, StatisticSet)


def test_a_sequential_first_stage_is_refused() -> None:
    with pytest.raises(InputError, match="sequential=true cannot be"):
        InterExpert(sequential=True)


def test_stages_that_measure_layer_by_layer_are_refused() -> None:
    with pytest.raises(InputError, match="MomentScore measures one layer at a time"):
        TwoStages(first=MomentScore(sequential=True), second=WhitenedSVD())
