import pytest
import torch

from families import tiny
from rerail.moe.attention import Received, received, watch_attention


def causal(*rows: list[float]) -> torch.Tensor:
    """Return a (1, 2, Q, Q) map whose two heads average to these rows."""
    average = torch.tensor(rows)
    apart = torch.tensor([[0.05], [-0.05]]).unsqueeze(-1) * (average > 0)
    return (average + apart).unsqueeze(0)


MAP = causal([1.0, 0.0, 0.0], [0.2, 0.8, 0.0], [0.3, 0.6, 0.1])


def test_it_is_the_mean_over_own_and_later_queries_and_not_the_row_sum():
    found, valid = received(MAP, None)
    torch.testing.assert_close(found, torch.tensor([[1.5 / 3, 1.4 / 2, 0.1 / 1]]))
    assert valid.all()
    by_rows = MAP.mean(dim=1).sum(dim=2) / torch.tensor([3.0, 2.0, 1.0])
    assert found.argmax() == 1
    assert by_rows.argmax() == 2


@pytest.mark.parametrize("kind", ["added", "true"])
def test_padded_queries_do_not_count(kind):
    seen = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 0]], dtype=torch.bool)
    lowest = torch.finfo(torch.float32).min
    mask = seen if kind == "true" else torch.zeros(3, 3).masked_fill(~seen, lowest)
    found, valid = received(MAP, mask[None, None])
    assert valid.tolist() == [[True, True, False]]
    torch.testing.assert_close(found[:, :2], torch.tensor([[1.2 / 2, 0.8 / 1]]))


def test_no_token_counts_while_decoding_with_a_cache():
    found, valid = received(MAP[:, :, 2:], None)
    assert found.tolist() == [[0.0]]
    assert not valid.any()


def test_only_banks_that_watch_are_served_and_only_once():
    model = tiny("qwen3_moe")
    attention = model.model.model.layers[1].self_attn
    watch_attention(model.model, model.layers)
    assert model.config._attn_implementation == "sdpa"
    model.layers[1].experts.watches = True
    for _ in range(2):
        watch_attention(model.model, model.layers)
    hooks = [hook for hook in attention._forward_hooks.values() if isinstance(hook, Received)]
    assert len(hooks) == 1
    assert not model.model.model.layers[0].self_attn._forward_hooks
    assert model.config._attn_implementation == "eager"
