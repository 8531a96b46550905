import pytest
import torch

from families import tiny, tokens
from rerail.compress.compressor import make_plan
from rerail.compress.methods.reap import MomentScore
from rerail.compress.pruning import best
from rerail.errors import OutOfReach
from rerail.plan.allocation import GlobalScore, PerLayer, Uniform
from rerail.plan.ratio import Ratio
from rerail.stats.collect import collect
from rerail.stats.routed import Count, Moment
from rerail.stats.statistic import StatisticSet

SCORES = torch.tensor([5.0, 4.0, 3.0, 9.0, 2.0, 1.0, 0.5, 0.2])


@pytest.mark.parametrize(
    ("count", "groups", "each", "kept"),
    [
        (3, 1, 0, (0, 1, 3)),
        (8, 1, 2, (0, 1, 2, 3, 4, 5, 6, 7)),
        (4, 2, 2, (0, 3, 4, 5)),
        (5, 2, 2, (0, 1, 3, 4, 5)),
        (4, 4, 1, (0, 3, 4, 6)),
    ],
)
def test_the_best_are_kept_with_enough_in_every_group(
    count: int, groups: int, each: int, kept: tuple[int, ...]
) -> None:
    assert best(SCORES, count, groups, each) == kept


def test_ties_keep_the_lower_slot() -> None:
    assert best(torch.ones(8), 3) == (0, 1, 2)


def scored(scores: torch.Tensor, layers: int = 2) -> StatisticSet:
    held = {Moment(1, 1).name: scores, Count().name: torch.ones(8, dtype=torch.int64)}
    return StatisticSet(dict.fromkeys(range(layers), held))


def test_a_sliced_grouped_router_keeps_equal_groups() -> None:
    layers = tiny("deepseek_v3").layers
    plan = make_plan(MomentScore(), layers, scored(SCORES), Ratio(0.5), Uniform())
    assert plan.layers[0].kept == (0, 3, 4, 5)


def test_a_masked_grouped_router_keeps_two_in_each_group_and_the_best_of_all() -> None:
    layers, method = tiny("deepseek_v3").layers, MomentScore(router="mask")
    plan = make_plan(method, layers, scored(SCORES), Ratio(0.375), Uniform())
    assert plan.layers[0].kept == (0, 1, 3, 4, 5)
    assert len(plan.layers[0].slots) == 8


@pytest.mark.parametrize(
    ("method", "allocation", "removed", "sentence"),
    [
        (MomentScore(), Uniform(), 0.25 / 2, "2 groups that must stay equal.*router=mask"),
        (MomentScore(), GlobalScore(), 0.5, "2 groups that must stay equal.*router=mask"),
        (MomentScore(), PerLayer((4, 5)), 0.5, "2 groups that must stay equal.*router=mask"),
        (MomentScore(), Uniform(), 0.75, r"leaves 2 of 8 .*at least 4.*ratios: 0 to 0.5"),
        (MomentScore(router="mask"), Uniform(), 0.75, r"at least 4 are needed.*ratios: 0 to 0.5"),
    ],
)
def test_grouped_routers_that_would_break_are_refused_before_any_statistic(
    method: MomentScore, allocation: object, removed: float, sentence: str
) -> None:
    with pytest.raises(OutOfReach, match=sentence):
        method.check(tiny("deepseek_v3").layers, Ratio(removed), allocation)


def test_fewer_experts_than_top_k_are_refused() -> None:
    with pytest.raises(OutOfReach, match=r"at least 2 are needed.*allowed ratios: 0 to 0.75"):
        MomentScore().check(tiny("qwen3_moe").layers, Ratio(0.875), Uniform())


def test_masks_may_be_allocated_globally_on_grouped_routers() -> None:
    layers, method = tiny("deepseek_v3").layers, MomentScore(router="mask")
    plan = make_plan(method, layers, scored(SCORES), Ratio(0.375), GlobalScore())
    assert sum(len(part.kept) for part in plan.layers) == 10


def test_a_plan_is_equivariant_under_permutation_of_the_experts() -> None:
    plain, order = tiny("qwen3_moe"), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    moved, method = tiny("qwen3_moe"), MomentScore()
    for layer in moved.layers:
        layer.router_rows.data = layer.router_rows.data[order]
        for parameter in layer.experts.parameters():
            parameter.data = parameter.data[order]
    ids = tokens(8, 16)
    batches = [(ids, torch.ones_like(ids, dtype=torch.bool))]
    torch.testing.assert_close(moved.hidden(ids), plain.hidden(ids), atol=1e-5, rtol=1e-5)
    kept = []
    for model in (plain, moved):
        filled = collect(model, batches, method.requires)
        plan = make_plan(method, model.layers, filled, Ratio(0.5), Uniform())
        kept.append([set(part.kept) for part in plan.layers])
    assert kept[0] == [{int(order[slot]) for slot in part} for part in kept[1]]
