import pytest
import torch

from families import tiny
from rerail.compress.compressor import make_plan
from rerail.compress.merging import group_members
from rerail.compress.methods.hc_smoe import HCSMoE
from rerail.errors import OutOfReach
from rerail.plan.allocation import GlobalScore, Uniform
from rerail.plan.ratio import Ratio
from rerail.stats.dense import OutputSum, TokenCount
from rerail.stats.routed import Count
from rerail.stats.statistic import StatisticSet


def test_members_are_weighted_by_their_share_of_the_group() -> None:
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    weights = torch.tensor([3, 0, 1, 0, 7, 0])
    assert group_members(4, labels, weights) == (
        ((4, 0, 0.75), (4, 2, 0.25)),
        ((4, 1, 0.5), (4, 3, 0.5)),
        ((4, 4, 1.0), (4, 5, 0.0)),
    )


def filled(counts: list[torch.Tensor]) -> StatisticSet:
    generator = torch.Generator().manual_seed(0)
    held = {}
    for i, count in enumerate(counts):
        outputs = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        tokens = torch.full((8,), 10)
        held[i] = {
            OutputSum().name: outputs,
            TokenCount().name: tokens,
            Count().name: count,
        }
    return StatisticSet(held)


def test_mergers_may_store_fewer_experts_than_top_k() -> None:
    layers = tiny("qwen3_moe").layers
    plan = make_plan(HCSMoE(), layers, filled([torch.ones(8).long()] * 2), Ratio(0.875), Uniform())
    assert [part.bank.stored for part in plan.layers] == [1, 1]
    assert all(part.kept == tuple(range(8)) for part in plan.layers)


def test_groups_may_be_allocated_by_usage() -> None:
    layers = tiny("qwen3_moe").layers
    skewed, even = torch.tensor([97, 1, 1, 1, 0, 0, 0, 0]), torch.full((8,), 10)
    plan = make_plan(HCSMoE(), layers, filled([skewed, even]), Ratio(0.5), GlobalScore())
    assert [part.bank.stored for part in plan.layers] == [1, 7]
    assert plan.lineage["achieved"] == 0.5


def test_no_group_at_all_is_refused() -> None:
    with pytest.raises(OutOfReach, match=r"at least 1 .* allowed ratios: 0 to 0.875"):
        HCSMoE().check(tiny("qwen3_moe").layers, Ratio(0.875 + 1e-3), PerNothing())


class PerNothing(Uniform):
    def keep(self, layers, ratio, scores, least):
        return [0] * len(layers)
