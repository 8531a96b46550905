import itertools

import pytest
import torch

from families import tiny
from rerail.compress.solvers.reconstruction import (
    Sample,
    coarse_to_fine,
    exhaustive,
    without_each,
)
from rerail.moe.model import MoELayer

FAMILIES = ["qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "lfm2_moe"]


def rows(count: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def squares(change: torch.Tensor) -> torch.Tensor:
    return change.double().square().sum(dim=(0, 2))


def free(left: object) -> list[int]:
    return list(left)


def layer_of(family: str = "qwen3_moe") -> MoELayer:
    return tiny(family).layers[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_rerouted_answers_are_those_of_the_layer(family: str) -> None:
    layer, hidden = layer_of(family), rows()
    sample, subsets = Sample(layer, hidden), [[0, 1, 4, 5], [0, 2, 3, 5, 6, 7], list(range(8))]
    whole = layer.answer(hidden)
    torch.testing.assert_close(sample.answer(), whole, atol=1e-5, rtol=1e-5)
    expected = [float((layer.answer(hidden, s) - whole).double().square().sum()) for s in subsets]
    found = sample.errors(subsets, squares)
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert found[2] == 0


def test_subsets_are_judged_the_same_in_any_number_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, subsets = Sample(layer_of(), rows()), list(itertools.combinations(range(8), 5))
    at_once = sample.errors(subsets, squares)
    monkeypatch.setattr("rerail.compress.solvers.reconstruction._NUMBERS", 20 * 16 * 3)
    torch.testing.assert_close(sample.errors(subsets, squares), at_once, rtol=1e-6, atol=0)


def test_a_target_of_its_own_moves_what_nothing_lost() -> None:
    layer, hidden = layer_of(), rows()
    target = layer.answer(rows(seed=2))
    sample = Sample(layer, hidden, target)
    expected = float((layer.answer(hidden) - target).double().square().sum())
    assert float(sample.errors([range(8)], squares)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_exhaustive_is_the_best_of_all_subsets_by_brute_force(count: int) -> None:
    layer, hidden = tiny("qwen3_moe", num_experts=6, seed=count).layers[1], rows(count=40)
    whole = layer.answer(hidden)
    expected = min(
        itertools.combinations(range(6), count),
        key=lambda kept: float((layer.answer(hidden, kept) - whole).norm()),
    )
    sample = Sample(layer, hidden)
    assert exhaustive(lambda s: sample.errors(s, squares), 6, count, free) == expected


def test_searches_agree_where_one_expert_goes() -> None:
    sample = Sample(layer_of(), rows())
    errors = lambda s: sample.errors(s, squares)  # noqa: E731
    kept = exhaustive(errors, 8, 7, free)
    assert coarse_to_fine(errors, 8, 7, free) == kept
    assert coarse_to_fine(errors, 8, 7, free, size=8, least=2) == kept


def plain_greedy(errors: object, experts: int, count: int) -> tuple[int, ...]:
    left = list(range(experts))
    while len(left) > count:
        found = errors([[slot for slot in left if slot != one] for one in left])
        del left[int(found.argmin())]
    return tuple(left)


@pytest.mark.parametrize("seed", range(4))
def test_one_group_and_groups_of_one_are_the_plain_greedy_search(seed: int) -> None:
    sample = Sample(layer_of(), rows(seed=seed))
    errors = lambda s: sample.errors(s, squares)  # noqa: E731
    expected = plain_greedy(errors, 8, 3)
    assert coarse_to_fine(errors, 8, 3, free, size=1, least=2) == expected
    assert coarse_to_fine(errors, 8, 3, free, size=8, least=2) == expected


def counted(experts: int, count: int, size: int) -> int:
    """Return how many subsets a search judges, when the error is one of the ids that are left."""
    asked = []

    def errors(subsets: list[list[int]]) -> torch.Tensor:
        asked.append(len(subsets))
        return torch.tensor([float((sum(kept) * 7919) % 1009) for kept in subsets])

    assert len(coarse_to_fine(errors, experts, count, free, size)) == count
    return sum(asked)


def test_evaluations_are_as_many_as_reported() -> None:
    assert 2.0e5 < 58 * counted(256, 128, 16) < 2.13e5
    assert counted(16, 8, 1) == sum(range(9, 17))
    assert counted(16, 15, 4) == 4 + 4


def test_the_coarse_search_opens_the_best_group_only() -> None:
    harm = torch.tensor([9.0, 0.0, 2.0, 2.0, 5.0, 5.0])

    def errors(subsets: list[list[int]]) -> torch.Tensor:
        return torch.stack([harm.sum() - harm[list(kept)].sum() for kept in subsets])

    assert coarse_to_fine(errors, 6, 5, free, size=2) == (0, 1, 3, 4, 5)
    assert coarse_to_fine(errors, 6, 5, free) == (0, 2, 3, 4, 5)


def test_no_judgement_leaves_fewer_experts_than_a_token_chooses() -> None:
    seen = []

    def errors(subsets: list[list[int]]) -> torch.Tensor:
        seen.extend(map(len, subsets))
        return torch.arange(float(len(subsets)))

    coarse_to_fine(errors, 16, 5, free, size=4, least=5)
    assert min(seen) == 5


def test_an_answer_that_is_no_number_is_never_the_best() -> None:
    sample = Sample(layer_of(), rows())
    sample.outputs[:, 0] = torch.nan
    found = sample.errors(without_each(range(8), [[0], [1]]), squares)
    assert found[1] == torch.inf
