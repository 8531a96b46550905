import pytest
import torch

from families import tiny, tokens
from rerail.compress.templates.skipper import GateTails
from rerail.experts.skip_policy import BINS, tails
from rerail.statistics.collect import Batch, collect
from rerail.statistics.statistic import StatisticSet


def batches(size: int) -> list[Batch]:
    ids = tokens(8, 24)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[6:, 10:] = False
    return list(zip(ids.split(size), mask.split(size), strict=True))


def test_a_tail_is_the_share_of_a_rank_and_all_below_it():
    found = tails(torch.tensor([[0.5, 0.1, 0.3], [0.25, 0.5, 0.25]]))
    expected = torch.tensor([[torch.inf, 1 / 9, 4 / 9], [0.5, torch.inf, 0.25]])
    torch.testing.assert_close(found, expected)
    ratio = torch.tensor([[0.6, 0.2]])
    assert float(tails(ratio)[0, 1]) == pytest.approx((1 / 3) / (1 + 1 / 3))


def test_tails_do_not_depend_on_scale_or_order_and_are_finite():
    weights = torch.rand(50, 4, generator=torch.manual_seed(0))
    torch.testing.assert_close(tails(weights * 2.5), tails(weights))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(tails(weights[:, order]), tails(weights)[:, order])
    zero = tails(torch.zeros(1, 3))
    assert not zero.isnan().any()
    assert torch.isinf(zero).sum() == 1


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "hunyuan_v1_moe"])
def test_the_histogram_counts_exactly_what_lies_below(family):
    model, seen = tiny(family), []
    found = collect(model, batches(4), [GateTails()]).tensors[0]["gate_tails"]
    hook = model.layers[0].experts.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    with torch.no_grad():
        for ids, mask in batches(4):
            model.hidden(ids, mask)
            seen[-1] = seen[-1][mask.flatten()]
    hook.remove()
    values = tails(torch.cat(seen))
    assert found.dtype == torch.int64
    assert int(found.sum()) == 6 * 24 + 2 * 10
    edges = {int(v * BINS) + i for v in values[values < 1].tolist() for i in (0, 1)}
    for b in edges:
        assert int(found[:b].sum()) == int((values < b / BINS).sum())


def test_shards_add_up():
    model, one = tiny("olmoe"), GateTails()
    whole = collect(model, batches(8), [one])
    parts = [collect(model, [b], [one]) for b in batches(2)]
    merged: StatisticSet = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part, [one])
    assert int((merged.tensors[1]["gate_tails"] - whole.tensors[1]["gate_tails"]).abs().sum()) <= 2
    assert merged.tensors[1]["gate_tails"].sum() == whole.tensors[1]["gate_tails"].sum()
