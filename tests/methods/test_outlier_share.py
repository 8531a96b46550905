import torch

from families import tiny, tokens
from rerail.methods.moe_svd import OutlierShare
from rerail.statistics.collect import collect
from rerail.statistics.routed import Count
from rerail.statistics.statistic import RoutedTokens


def test_entries_far_above_a_tokens_mean_are_outliers() -> None:
    hidden = torch.tensor([[9.0, -1, 1, 1], [2, 2, 2, 2], [-9, 9, 0.1, 0.1]])
    index = torch.tensor([[0, 1], [1, 2], [0, 2]])
    seen = RoutedTokens(hidden=hidden, index=index, gates=torch.ones(3, 2), num_experts=4)
    assert OutlierShare(2.0).measure(seen).tolist() == [0.25, 0.25, 0, 0]
    assert OutlierShare(1.5).measure(seen).tolist() == [0.75, 0.25, 0.5, 0]
    assert OutlierShare(1.5).name != OutlierShare(2.0).name


def test_batches_do_not_matter_and_no_token_counts_for_more_than_one() -> None:
    model, ids = tiny("qwen3_moe"), tokens(6, 12)
    mask = torch.ones_like(ids, dtype=torch.bool)
    wanted = [OutlierShare(), Count()]
    whole = collect(model, [(ids, mask)], wanted)
    parts = collect(model, list(zip(ids.split(2), mask.split(2), strict=True)), wanted)
    for i, held in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[i]["outlier_share_2"], held["outlier_share_2"])
        assert (held["outlier_share_2"] <= held["count"]).all()
        assert held["outlier_share_2"].sum() > 0
