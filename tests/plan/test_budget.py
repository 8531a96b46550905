from typing import Any

import pytest
import torch

from families import tiny
from rerail.errors import InputError, OutOfReach
from rerail.moe.model import MoELayer
from rerail.plan.allocation import GlobalScore, PerLayer, Uniform, check_kept, removed_shares
from rerail.plan.budget import Bits, Budget, Ratio, Skip, dense_numbers, numbers_kept, units_kept
from rerail.plan.sizes import Sizes

LAYERS = tiny("qwen3_moe", num_hidden_layers=3).layers


def keep(allocation: Any, removed: float, scores: Any = None, least: int = 2) -> list[int]:
    scores = [torch.ones(8)] * 3 if scores is None else scores
    shares = removed_shares(LAYERS, Ratio(removed), allocation, [least] * 3, scores)
    return [units_kept(8, share) for share in shares]


@pytest.mark.parametrize("removed", [-0.1, 1, 1.5, float("nan")])
def test_a_ratio_outside_the_unit_interval_is_refused(removed: float) -> None:
    with pytest.raises(InputError, match=r"outside \[0, 1\)"):
        Ratio(removed)


def test_a_ratio_of_something_else_is_refused() -> None:
    with pytest.raises(InputError, match="'model', which is not known; allowed: 'routed'"):
        Ratio(0.5, counts="model")


def experts(count: int) -> MoELayer:
    return tiny("qwen3_moe", num_experts=count, num_experts_per_tok=1, num_hidden_layers=1).layers[
        0
    ]


@pytest.mark.parametrize(
    ("count", "removed", "expected"),
    [(8, 0.375, 3), (10, 0.3, 3), (10, 0.7, 7), (10, 0.35, 3), (100, 0.29, 29), (8, 0.1, 0)],
)
def test_removed_experts_are_exact_where_integers_allow(
    count: int, removed: float, expected: int
) -> None:
    assert count - units_kept(count, removed) == expected


def test_numbers_kept_are_exact_where_integers_allow() -> None:
    layer = experts(10)
    assert numbers_kept(dense_numbers(layer), 0.3) == 7 * layer.expert_size
    assert numbers_kept(dense_numbers(layer), 1 / 3) == 10 * layer.expert_size * 2 // 3


@pytest.mark.parametrize("count", [1, 7, 8, 60, 64, 128, 160, 384])
def test_shares_of_a_layer_are_exact_in_every_unit(count: int) -> None:
    layer = experts(count)
    for left in range(count + 1):
        [share] = PerLayer((left,)).shares([layer], 0.5, [1])
        assert units_kept(count, share) == left
        assert units_kept(24 * count, share) == 24 * left
        for size in (1, layer.expert_size, 3 * 7168 * 2048):
            assert numbers_kept(size * count, share) == size * left


@pytest.mark.parametrize("average", [1, 1.75, 2, 2.3, 3, 4, 8, 16])
def test_bits_are_rounded_down_and_exact_where_integers_allow(average: float) -> None:
    removed = Bits(average).removed
    for count in (8, 10, 60, 128):
        bits = numbers_kept(16 * count, removed)
        assert bits <= count * average + 1e-6 < bits + 1


@pytest.mark.parametrize(
    ("budget", "quantity", "removed"),
    [(Ratio(0.3), "ratio", 0.3), (Bits(4), "bits", 0.75), (Skip(0.5), "skip", 0.5)],
)
def test_a_budget_names_its_quantity_its_share_and_how_it_is_asked_for(
    budget: Budget, quantity: str, removed: float
) -> None:
    assert (budget.quantity, budget.removed) == (quantity, removed)
    assert repr(budget).split("(")[0] in budget.choices


def test_uniform_keeps_the_same_share_of_every_layer() -> None:
    assert keep(Uniform(), 0.5) == [4, 4, 4]
    assert keep(Uniform(), 0.3) == [6, 6, 6]


def test_global_scores_move_experts_to_the_layers_that_need_them() -> None:
    peaked, flat = torch.tensor([0.9, 0.1] + [0.0] * 6), torch.ones(8)
    scores = [peaked, flat, torch.arange(8.0)]
    for removed in (0.25, 0.5, 0.6):
        counts = keep(GlobalScore(), removed, scores)
        assert sum(counts) == sum(keep(Uniform(), removed))
        assert min(counts) == counts[0] >= 2
    assert keep(GlobalScore(), 0.5, scores) == [2, 6, 4]
    assert keep(GlobalScore(floor=4), 0.5, scores) == [4, 4, 4]


def test_global_scores_ignore_the_scale_of_a_layer() -> None:
    scores = [torch.rand(8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    scaled = [scores[0] * 1e3, scores[1], scores[2] * 1e-3]
    assert keep(GlobalScore(), 0.5, scores) == keep(GlobalScore(), 0.5, scaled)


def test_a_layer_without_any_score_keeps_the_least() -> None:
    scores = [torch.zeros(8), torch.ones(8), torch.ones(8)]
    assert keep(GlobalScore(), 0.5, scores) == [2, 5, 5]


def test_global_scores_refuse_what_they_cannot_keep() -> None:
    with pytest.raises(OutOfReach, match=r"keep 6 experts .* allowed ratios: 0 to 0.625"):
        keep(GlobalScore(), 0.75, least=3)


def test_an_explicit_list_is_taken_as_it_is() -> None:
    assert keep(PerLayer((8, 3, 5)), 0.5) == [8, 3, 5]
    with pytest.raises(InputError, match="has 2 entries; the model has 3 MoE layers"):
        keep(PerLayer((8, 3)), 0.5)


@pytest.mark.parametrize("count", [1, 9])
def test_counts_out_of_bounds_are_refused_with_the_reach(count: int) -> None:
    check_kept(LAYERS, [2, 8, 5], [2] * 3)
    with pytest.raises(OutOfReach, match=r"leaves . of 8 .* allowed ratios: 0 to 0.75"):
        check_kept(LAYERS, [2, count, 5], [2] * 3)


def test_sizes_speak_of_bytes_and_shares() -> None:
    before = Sizes.from_counts(1000, 800, 300, 800 * 16, 2)
    after = Sizes.from_counts(600, 400, 290, 400 * 16, 2)
    assert after.bytes == 1200
    assert after.removed_of_experts(before) == 0.5
    assert after.removed_of_model(before) == 0.4
