import dataclasses

import pytest
import torch

from families import CONFIGS, tiny
from rerail.compress.base import make_plan
from rerail.compress.solvers.ranks import filled
from rerail.errors import InputError, OutOfReach
from rerail.experts.base import bank_class
from rerail.methods.d2_moe import D2MoE
from rerail.methods.mobe import MoBE
from rerail.methods.moe_svd import MoESVD, spare
from rerail.methods.svd import WhitenedSVD
from rerail.moe.model import MoELayer
from rerail.plan.allocation import GlobalScore, PerLayer, Uniform
from rerail.plan.budget import Ratio, dense_numbers, numbers_kept
from rerail.statistics.statistic import StatisticSet

PLAIN = WhitenedSVD(whiten=False)
METHODS = [
    PLAIN,
    MoESVD(),
    MoESVD(rows="stack"),
    MoESVD(distinct=6),
    D2MoE(),
    D2MoE(rows="shared"),
    D2MoE(base_prune=0.3),
]


def stored(method, layer: MoELayer, sizes) -> int:
    spec = method.spec(layer, sizes)
    if getattr(method, "base_prune", 0):
        left = layer.intermediate_size - int(layer.intermediate_size * method.base_prune)
        spec = dataclasses.replace(spec, integers={**spec.integers, "channels": tuple(range(left))})
    return sum(bank_class(spec.kind).predicted(spec, layer.index, layer.dims).values())


@pytest.mark.parametrize("removed", [0.1, 0.25, 0.45, 0.6, 0.75, 0.97])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_ranks_use_the_budget_up_or_the_reach_is_named(method, family: str, removed: float) -> None:
    layer = tiny(family).layers[0]
    budget = numbers_kept(dense_numbers(layer), removed)
    _, types = method.ranks(layer)
    try:
        sizes = method.sizes(layer, budget)
    except OutOfReach as refused:
        low, high = (float(w) for w in str(refused).split("ratios from ")[1].split()[:3:2])
        assert not low - 1e-3 < removed < high - 1e-3
        assert method.sizes(layer, numbers_kept(dense_numbers(layer), (low + high) / 2))
        return
    assert budget - max(r.cost for r in types.values()) < stored(method, layer, sizes) <= budget
    for name, rank in types.items():
        each = sizes[name] if rank.experts else (sizes[name],)
        assert len(each) == (rank.experts or 1)
        assert all(1 <= r <= rank.cap for r in each)
        assert max(each) - min(each) <= 1


def test_shares_follow_scores_and_the_remainder_is_given_out() -> None:
    scores = torch.tensor([5, 1, 1, 0.01, 9]).double()
    exact = filled(scores, [1] * 5, [100] * 5, 37)
    assert sum(exact) == 37
    floor = [max(1, int(37 * s / scores.sum())) for s in scores.tolist()]
    assert sum(floor) == 36
    assert exact == filled(1000 * scores, [1] * 5, [100] * 5, 37)
    order = scores.argsort().tolist()
    assert [exact[i] for i in order] == sorted(exact)
    assert filled(torch.ones(5), [3, 5, 3, 3, 3], [4, 9, 9, 9, 9], 88) == [4, 6, 5, 5, 5]
    assert filled(torch.ones(3), [2, 2, 2], [4, 4, 4], 999) == [4, 4, 4]
    assert filled(torch.tensor([0.0, 1.0]), [1, 1], [9, 9], 8) == [1, 7]


@pytest.mark.parametrize("seed", range(20))
def test_ranks_are_monotone_within_one_cost_of_the_budget(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(12, generator=generator, dtype=torch.float64)
    costs = torch.randint(3, 9, (12,), generator=generator).tolist()
    budget = sum(costs) + 137
    found = filled(scores, costs, [40] * 12, budget)
    spent = sum(c * r for c, r in zip(costs, found, strict=True))
    assert budget - max(costs) < spent <= budget
    even = filled(scores, [5] * 12, [10] * 12, 300)
    assert [even[i] for i in scores.argsort().tolist()] == sorted(even)
    assert 300 - 5 < 5 * sum(even) <= 300


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_list_of_kept_experts_stands_for_their_numbers(family: str) -> None:
    layers = tiny(family).layers
    plan = make_plan(PLAIN, layers, StatisticSet(), Ratio(0.5), PerLayer((8, 3)))
    assert [part.layer for part in plan.layers] == [1]
    spec = plan.layers[0].bank
    held = sum(bank_class("low_rank").predicted(spec, 1, layers[1].dims).values())
    size = layers[1].expert_size
    assert 3 * size - 24 < held <= 3 * size
    with pytest.raises(OutOfReach, match="9 of 8 experts"):
        PLAIN.check(layers, Ratio(0.5), PerLayer((9, 3)))
    with pytest.raises(InputError, match="2 MoE layers"):
        PLAIN.check(layers, Ratio(0.5), PerLayer((3,)))
    with pytest.raises(OutOfReach, match="WhitenedSVD keeps them all; use allocation=uniform"):
        PLAIN.check(layers, Ratio(0.5), GlobalScore())


def test_layers_that_stay_dense_are_paid_for_by_the_others() -> None:
    layers = tiny("qwen3_moe", num_hidden_layers=4).layers
    whole = dense_numbers(layers[0])
    budgets = [int(0.6 * whole)] * 4
    assert spare(layers, budgets, []) == budgets
    found = spare(layers, budgets, [2])
    assert found[2] == whole
    assert found[0] == found[1] == found[3]
    assert sum(budgets) - 3 <= sum(found) <= sum(budgets)
    with pytest.raises(OutOfReach, match=r"3 of 4 layers .* less than 0\.25 can be reached"):
        spare(layers, budgets, [0, 1, 2])


def test_how_experts_run_is_an_option_of_every_factoriser() -> None:
    layers = tiny("qwen3_moe").layers
    for method in (PLAIN, MoBE(steps=2)):
        for run, expected in (("stored", {}), ("materialised", {"run": "materialised"})):
            made = dataclasses.replace(method, run=run)
            plan = make_plan(made, layers, StatisticSet(), Ratio(0.4), Uniform())
            options = plan.layers[0].bank.options
            assert {k: v for k, v in options.items() if k == "run"} == expected
