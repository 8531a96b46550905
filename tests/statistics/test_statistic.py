from dataclasses import dataclass

import pytest
import torch

from families import tiny
from rerail.statistics.routed import Count, Moment
from rerail.statistics.statistic import RoutedTokens, Statistic, StatisticSet, UndeclaredError


class Largest(Count):
    merges_by = "max"
    name = "count"


def test_only_declared_statistics_can_be_read() -> None:
    layer = tiny("qwen3_moe").layers[0]
    held = StatisticSet({0: {"count": torch.arange(8), "moment_g1_n1": torch.ones(8)}})
    view = held.of(layer, [Count()])
    assert torch.equal(view[Count()], torch.arange(8))
    assert view.read == {Count()}
    assert list(view) == [Count()]
    with pytest.raises(UndeclaredError, match="moment_g1_n1"):
        view[Moment(1, 1)]


@dataclass(frozen=True)
class TwoWords(Count):
    limit: float = 0.5
    count: int = 1_234_567


def test_a_name_is_the_class_and_its_settings_and_tells_all_settings_apart() -> None:
    assert Count().name == "count"
    assert TwoWords().name == "two_words_0.5_1234567"
    assert TwoWords(count=1_234_568).name != TwoWords().name


def test_shards_merge_by_the_statistics_own_rule() -> None:
    a = StatisticSet({0: {"count": torch.tensor([1, 5])}})
    b = StatisticSet({0: {"count": torch.tensor([4, 2])}})
    assert a.merge(b, [Count()]).tensors[0]["count"].tolist() == [5, 7]
    assert a.merge(b, [Largest()]).tensors[0]["count"].tolist() == [4, 5]


def test_names_and_identities_include_the_settings() -> None:
    statistics: list[Statistic] = [Count(), Moment(1, 1), Moment(1, 2), Moment(2, 1)]
    assert len({s.name for s in statistics}) == len(set(statistics)) == 4
    assert Moment(1, 2) == Moment(1, 2)


def routed_tokens() -> RoutedTokens:
    """Three tokens of two choices among four slots; slot 2 is never chosen."""
    index = torch.tensor([[3, 0], [0, 1], [3, 1]])
    values = torch.arange(6.0).view(3, 2)
    return RoutedTokens(hidden=torch.eye(3), index=index, gates=values, num_experts=4)


def test_pairs_are_grouped_by_slot_and_in_a_slot_by_token() -> None:
    tokens = routed_tokens()
    found = {e: (rows.tolist(), choices.tolist()) for e, rows, choices in tokens.by_expert()}
    assert found == {0: ([0, 1], [1, 0]), 1: ([1, 2], [1, 1]), 3: ([0, 2], [0, 0])}
    assert tokens.sorted(tokens.gates).tolist() == [1, 2, 3, 5, 0, 4]
    runs = {e: run.tolist() for e, (run,) in tokens.runs(tokens.sorted_gates.flatten())}
    assert runs == {0: [1, 2], 1: [3, 5], 3: [0, 4]}


def test_values_are_added_up_by_slot_in_float64() -> None:
    tokens = routed_tokens()
    assert tokens.sum_by_expert(tokens.gates).tolist() == [3, 8, 0, 4]
    vectors = torch.stack([tokens.gates, -tokens.gates], dim=-1)
    summed = tokens.sum_by_expert(vectors)
    assert summed.tolist() == [[3, -3], [8, -8], [0, 0], [4, -4]]
    assert summed.dtype == tokens.sum_by_expert(tokens.gates).dtype == torch.float64


def test_a_moment_needs_norms_only_where_the_norm_enters() -> None:
    assert Moment(2, 0).needed() == frozenset()
    assert Moment(0, 1).needed() == {"norms"}
