"""Genetic search, and how layers share what is removed."""

import math
from itertools import combinations

import pytest
import torch

from families import tiny, tokens
from rerail.compress.solvers.genetic import Removals, dealt, evolve
from rerail.compress.solvers.reconstruction import Sample
from rerail.errors import OutOfReach
from rerail.methods.moe_i2 import InterExpert, norms
from rerail.plan.allocation import PerLayer, Uniform
from rerail.plan.budget import Ratio
from rerail.statistics.collect import collect
from rerail.statistics.token_sample import TokenSample


def removals(experts: int = 8, groups: int = 1, each: int = 3, fixed=()) -> Removals:
    return Removals(experts, groups, each, fixed, torch.Generator().manual_seed(0))


def filled(family: str, rows: int = 64):
    model, ids = tiny(family), tokens(6, 12)
    batch = (ids, torch.ones_like(ids, dtype=torch.bool))
    return model, collect(model, [batch], [TokenSample(rows)])


@pytest.mark.parametrize(("groups", "each", "fixed"), [(1, 3, ()), (2, 1, (5,)), (4, 1, (0, 2))])
def test_every_set_has_its_size_in_every_group_and_spares_the_fixed(groups, each, fixed) -> None:
    sets = removals(8, groups, each, fixed)
    parents = sets.random(50)
    for found in (parents, sets.children(parents, 50, 0.0), sets.children(parents, 50, 1.0)):
        assert (found.view(50, groups, -1).sum(dim=2) == each).all()
        assert not found[:, list(fixed)].any()
        assert len(torch.unique(found, dim=0)) > 1


def test_children_come_from_the_union_of_two_parents_and_mutants_differ_by_one_exchange() -> None:
    parents = torch.zeros(2, 12, dtype=torch.bool)
    parents[0, :4], parents[1, 3:7] = True, True
    plain = removals(12, 1, 4).children(parents, 60, 0.0)
    assert not plain[:, 7:].any()
    assert plain.any(dim=0).sum() == 7
    mutants = removals(12, 1, 4).children(parents, 60, 1.0)
    assert ((plain != mutants).sum(dim=1) == 2).all()


def test_the_search_finds_the_best_of_all_sets_and_returns_none_twice() -> None:
    model, held = filled("qwen3_moe")
    layer = model.layers[0]
    pruner = InterExpert(rows=64)
    sample = Sample(layer, TokenSample.hidden(held.of(layer, pruner.requires)[TokenSample(64)]))
    kept = [tuple(s) for s in combinations(range(8), 5)]
    whole = layer.answer(sample.hidden)
    brute = [float((layer.answer(sample.hidden, s) - whole).norm()) for s in kept]
    best = kept[min(range(len(kept)), key=brute.__getitem__)]

    def errors(subsets):
        return sample.errors(subsets, norms)

    torch.testing.assert_close(errors(kept), torch.tensor(brute).double(), rtol=1e-4, atol=1e-5)
    found = evolve(errors, removals(), 30, 10, 0.2, 0.3)
    assert found[0] == best
    assert len(set(found)) == len(found)
    assert all(len(subset) == 5 and list(subset) == sorted(subset) for subset in found)
    again = evolve(errors, removals(), 30, 10, 0.2, 0.3)
    assert again == found
    share = evolve(errors, removals(), 4, 0, 0.5, 0.3)
    assert len(share) <= 4


def test_selection_matters_more_than_chance() -> None:
    """On 16 experts of which 8 go, few evaluations reach the best set of a separable error."""
    cost = torch.arange(16).double()
    tried = []

    def errors(subsets):
        tried.extend(subsets)
        gone = [cost.sum() - cost[list(s)].sum() for s in subsets]
        return torch.stack(gone)

    found = evolve(errors, removals(16, 1, 8), 40, 20, 0.2, 0.3)
    assert found[0] == tuple(range(8, 16))
    assert len(tried) == len(set(tried)) < math.comb(16, 8) / 10


@pytest.mark.parametrize("total", [0, 1, 7, 13, 20])
def test_what_is_dealt_sums_up_keeps_caps_and_order(total: int) -> None:
    weights, caps = torch.tensor([8.0, 1.0, 3.0, 3.0]), [6, 4, 4, 6]
    found = dealt(weights, total, caps)
    assert sum(found) == total
    assert all(0 <= n <= cap for n, cap in zip(found, caps, strict=True))
    same = dealt(weights, min(total, 16), [4] * 4)
    assert same[0] >= same[2] >= same[1]
    assert abs(same[2] - same[3]) <= 1


def test_shares_are_exact_where_integers_allow() -> None:
    assert dealt(torch.tensor([1.0, 2.0, 3.0]), 12, [12, 12, 12]) == [2, 4, 6]
    assert dealt(torch.tensor([1.0, 2.0, 9.0]), 12, [12, 12, 3]) == [3, 6, 3]
    assert dealt(torch.tensor([1e-9, 1.0]), 5, [4, 3]) == [2, 3]


def test_an_important_layer_loses_fewer_experts_of_the_same_total() -> None:
    model, held = filled("qwen3_moe")
    loud = model.layers[1]
    loud.experts.down_proj.mul_(3)
    held = collect(model, [(tokens(6, 12), torch.ones(6, 12, dtype=torch.bool))], [TokenSample(64)])
    pruner = InterExpert(rows=64)
    counts = pruner.allocate(model.layers, held, Ratio(0.5), Uniform())
    assert sum(counts) == 8
    assert counts[0] < counts[1]
    assert pruner.allocate(model.layers, held, Ratio(0.5), PerLayer((5, 3))) == [5, 3]
    even = InterExpert(rows=64, nonuniform=False)
    assert even.allocate(model.layers, held, Ratio(0.5), Uniform()) == [4, 4]


def test_grouped_routers_lose_the_same_number_in_every_group() -> None:
    model, held = filled("deepseek_v3")
    pruner = InterExpert(rows=64)
    pruner.check(model.layers, Ratio(0.25), Uniform())
    counts = pruner.allocate(model.layers, held, Ratio(0.25), Uniform())
    assert sum(counts) == 12
    for layer, count in zip(model.layers, counts, strict=True):
        kept = pruner.choose(layer, held.of(layer, pruner.requires), count, frozenset())
        assert len(kept) == count
        assert sum(slot < 4 for slot in kept) == count // 2


def test_what_top_k_needs_is_said_beforehand() -> None:
    layers = tiny("qwen3_moe").layers
    InterExpert().check(layers, Ratio(0.75), Uniform())
    with pytest.raises(OutOfReach, match=r"allowed ratios: 0 to 0\.75"):
        InterExpert().check(layers, Ratio(0.9), Uniform())
