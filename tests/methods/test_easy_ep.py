import pytest
import torch

from families import tiny, tokens
from rerail.methods.easy_ep import Deviation, EasyEP
from rerail.moe.model import MoEModel
from rerail.statistics.collect import collect


def scores(model: MoEModel, layer: int = 0) -> torch.Tensor:
    ids, method = tokens(6, 24), EasyEP()
    filled = collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], method.requires)
    view = model.layers[layer]
    return method.score(view, filled.of(view, method.requires))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_score_is_the_sum_of_gated_norms_at_tokens_that_turn(family: str) -> None:
    model, seen = tiny(family), {}
    found, layer = scores(model), model.layers[0]
    decoder = model.model.model.layers[0]
    norm = decoder.post_attention_layernorm
    hooks = [
        norm.register_forward_pre_hook(lambda _, args: seen.update(before=args[0])),
        layer.experts.register_forward_pre_hook(lambda _, args: seen.update(routed=args)),
    ]
    with torch.no_grad():
        model.hidden(tokens(6, 24))
        for hook in hooks:
            hook.remove()
        before, (hidden, index, weights) = seen["before"].reshape(-1, 16), seen["routed"]
        after = before + layer.experts(hidden, index, weights)
        turned = (1 - torch.cosine_similarity(before, after, dim=-1)).clamp(min=0)
        expected = torch.zeros(8, dtype=torch.float64)
        for t, (slots, gates) in enumerate(zip(index, weights, strict=True)):
            for slot, gate in zip(slots, gates, strict=True):
                one = layer.experts(hidden[t : t + 1], slot.view(1, 1), torch.ones(1, 1))
                expected[slot] += float(gate * one.norm() * turned[t])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert turned.max() < 2


def test_experts_that_add_nothing_turn_nothing() -> None:
    model = tiny("qwen3_moe")
    model.layers[0].experts.down_proj.data.zero_()
    assert scores(model).abs().max() == 0


def test_all_rows_stay_unless_they_are_to_be_sliced() -> None:
    assert EasyEP().router == "mask"
    assert EasyEP().requires == (Deviation(),)
