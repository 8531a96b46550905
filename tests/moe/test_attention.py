import dataclasses

import pytest
import torch

from families import tiny
from rerail.moe.attention import AttentionHook, attention_received, watch_attention
from rerail.plan.apply import apply_plan
from stored_forms import skipping


def causal(*rows: list[float]) -> torch.Tensor:
    """Return a (1, 2, Q, Q) map whose two heads average to these rows."""
    average = torch.tensor(rows)
    apart = torch.tensor([[0.05], [-0.05]]).unsqueeze(-1) * (average > 0)
    return (average + apart).unsqueeze(0)


MAP = causal([1.0, 0.0, 0.0], [0.2, 0.8, 0.0], [0.3, 0.6, 0.1])


def test_it_is_the_mean_over_own_and_later_queries_and_not_the_row_sum():
    mean, valid = attention_received(MAP, None)
    torch.testing.assert_close(mean, torch.tensor([[1.5 / 3, 1.4 / 2, 0.1 / 1]]))
    assert valid.all()
    by_rows = MAP.mean(dim=1).sum(dim=2) / torch.tensor([3.0, 2.0, 1.0])
    assert mean.argmax() == 1
    assert by_rows.argmax() == 2


@pytest.mark.parametrize("kind", ["added", "true"])
def test_padded_queries_do_not_count(kind):
    seen = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 0]], dtype=torch.bool)
    lowest = torch.finfo(torch.float32).min
    mask = seen if kind == "true" else torch.zeros(3, 3).masked_fill(~seen, lowest)
    mean, valid = attention_received(MAP, mask[None, None])
    assert valid.tolist() == [[True, True, False]]
    torch.testing.assert_close(mean[:, :2], torch.tensor([[1.2 / 2, 0.8 / 1]]))


def test_no_token_counts_while_decoding_with_a_cache():
    mean, valid = attention_received(MAP[:, :, 2:], None)
    assert mean.tolist() == [[0.0]]
    assert not valid.any()


def test_only_banks_that_watch_are_served_and_only_once():
    model = tiny("qwen3_moe")
    blocks = {layer.name: layer.block for layer in model.layers}
    watch_attention(model.model, blocks)
    assert model.config._attn_implementation == "sdpa"
    protecting = skipping("0.3")
    student = apply_plan(model, dataclasses.replace(protecting, layers=protecting.layers[1:]))
    watch_attention(student.model, {layer.name: layer.block for layer in student.layers})
    first, second = (layer.self_attn for layer in student.model.model.layers)
    assert not first._forward_hooks
    assert [type(hook) for hook in second._forward_hooks.values()] == [AttentionHook]
    assert student.config._attn_implementation == "eager"
