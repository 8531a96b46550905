import pytest
import torch

from families import tiny
from rerail.stats.routed import Count, Moment
from rerail.stats.statistic import Statistic, StatisticSet, UndeclaredError


class Largest(Count):
    merge = "max"


def test_only_declared_statistics_can_be_read() -> None:
    layer = tiny("qwen3_moe").layers[0]
    held = StatisticSet({0: {"count": torch.arange(8), "moment_g1_n1": torch.ones(8)}})
    view = held.of(layer, [Count()])
    assert torch.equal(view[Count()], torch.arange(8))
    assert view.read == {Count()}
    assert list(view) == [Count()]
    with pytest.raises(UndeclaredError, match="moment_g1_n1"):
        view[Moment(1, 1)]


def test_shards_merge_by_the_statistics_own_rule() -> None:
    a = StatisticSet({0: {"count": torch.tensor([1, 5])}})
    b = StatisticSet({0: {"count": torch.tensor([4, 2])}})
    assert a.merged(b, [Count()]).tensors[0]["count"].tolist() == [5, 7]
    assert a.merged(b, [Largest()]).tensors[0]["count"].tolist() == [4, 5]


def test_names_and_identities_include_the_settings() -> None:
    statistics: list[Statistic] = [Count(), Moment(1, 1), Moment(1, 2), Moment(2, 1)]
    assert len({s.name for s in statistics}) == len(set(statistics)) == 4
    assert Moment(1, 2) == Moment(1, 2)
