from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from families import CONFIGS, tiny, tokens
from rerail.errors import InputError
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoEModel, find_layers

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def build(family: str, **changes: Any) -> torch.nn.Module:
    with torch.device("meta"):
        config = AutoConfig.for_model(family, **{**SMALL, **changes})
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", CONFIGS)
def test_layers_are_found_with_their_sizes(family: str) -> None:
    layers = tiny(family).layers
    assert [layer.index for layer in layers] == [0, 1]
    for layer in layers:
        width = 24 if family == "mixtral" else 8
        assert (layer.num_experts, layer.top_k, layer.hidden_size) == (8, 2, 16)
        assert layer.intermediate_size == width
        assert layer.fine_grained is (width <= 16)
        assert layer.num_groups == (2 if family == "deepseek_v3" else 1)
        biases = 2 * width + 16 if family == "gpt_oss" else 0
        assert layer.expert_size == 3 * width * 16 + biases
        assert layer.router_rows.shape == (8, 16)


def test_a_dense_first_layer_is_skipped() -> None:
    assert [layer.index for layer in tiny("glm4_moe", first_k_dense_replace=1).layers] == [1]


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(InputError, match="'qwen3' has no MoE layers"):
        find_layers(build("qwen3"))


def test_a_family_outside_the_seam_is_refused_with_the_reason() -> None:
    model = build("llama4_text", num_local_experts=4, intermediate_size_mlp=24)
    with pytest.raises(InputError, match="'llama4_text' is not supported: its experts are called"):
        find_layers(model)


def test_experts_that_are_not_fused_are_refused() -> None:
    model = tiny("qwen3_moe").model
    model.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(InputError, match="not fused"):
        find_layers(model)


def by_hand(family: str, experts: Any, weights: tuple[Tensor, ...], i: int, x: Tensor) -> Tensor:
    """Return one expert's output from its canonical matrices, with the family's own gating."""
    gate, up, down = (x.new_tensor(w.tolist()) for w in weights)
    g, u = F.linear(x, gate), F.linear(x, up)
    if family != "gpt_oss":
        return F.linear(experts.act_fn(g) * u, down)
    g = (g + experts.gate_up_proj_bias[i, ::2]).clamp(max=experts.limit)
    u = (u + experts.gate_up_proj_bias[i, 1::2]).clamp(-experts.limit, experts.limit)
    hidden = (u + 1) * g * torch.sigmoid(experts.alpha * g)
    return F.linear(hidden, down) + experts.down_proj_bias[i]


@pytest.mark.parametrize("family", CONFIGS)
def test_canonical_matrices_reproduce_the_experts_module(family: str) -> None:
    layer = tiny(family).layers[1]
    x = torch.randn(6, 16) * 4
    stack = layer.stack()
    for i in range(8):
        weights = layer.expert(i)
        assert [tuple(w.shape) for w in weights] == [
            (layer.intermediate_size, 16),
            (layer.intermediate_size, 16),
            (16, layer.intermediate_size),
        ]
        assert all(torch.equal(w, s[i]) for w, s in zip(weights, stack, strict=True))
        out = layer.experts(x, torch.full((6, 1), i), torch.ones(6, 1))
        torch.testing.assert_close(by_hand(family, layer.experts, weights, i, x), out)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_packing_is_the_inverse_of_unpacking(family: str) -> None:
    layer = tiny(family).layers[0]
    packed, own = layer.layout.pack(layer.stack()), expert_parameters(layer.experts)
    assert all(torch.equal(packed[name], own[name]) for name in ("gate_up_proj", "down_proj"))


@pytest.mark.parametrize("family", CONFIGS)
def test_head_and_hidden_are_the_model(family: str) -> None:
    model, ids = tiny(family), tokens()
    with torch.no_grad():
        logits = model.model(ids).logits
        hidden = model.hidden(ids)
        assert torch.equal(model.head(hidden), logits)
        torch.testing.assert_close(model.head(hidden[0, 3]), logits[0, 3])
        assert torch.equal(model.model(ids).logits, logits)


def test_the_head_keeps_its_scale() -> None:
    scaled, plain = tiny("granitemoe"), tiny("granitemoe", logits_scaling=1.0)
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(scaled.head(hidden) * 4, plain.head(hidden))


def test_the_head_works_beside_router_logits_and_leaves_the_body_as_it_was() -> None:
    model = tiny("qwen3_moe")
    model.config.output_router_logits = True
    body, own = model.model.base_model, model.model.base_model.forward
    body.forward = own
    assert model.head(torch.randn(2, 16)).shape == (2, 64)
    assert body.__dict__["forward"] is own
    assert model.config.output_router_logits is True


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_does_not_move_hidden_states(family: str) -> None:
    model, ids = tiny(family), tokens(2, 12)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 8:] = False
    with torch.no_grad():
        padded, short = model.hidden(ids, mask), model.hidden(ids[1:, :8])
    torch.testing.assert_close(padded[1:, :8], short, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_sizes_count_every_number_of_the_checkpoint_once(family: str) -> None:
    model = tiny(family)
    state = {t.data_ptr(): t.numel() for t in model.model.state_dict().values()}
    assert model.parameters_total() == sum(state.values())
    assert model.parameters_routed() == 2 * 8 * model.layers[0].expert_size
    idle = 2 * (8 - 2) * model.layers[0].expert_size
    assert model.parameters_active() == model.parameters_total() - idle


def test_a_shared_copy_has_new_modules_and_the_same_tensors() -> None:
    model = tiny("deepseek_v3")
    shared = model.with_shared_parameters()
    pairs = zip(model.model.modules(), shared.model.modules(), strict=True)
    assert all(a is not b for a, b in pairs)
    tensors = zip(
        [*model.model.parameters(), *model.model.buffers()],
        [*shared.model.parameters(), *shared.model.buffers()],
        strict=True,
    )
    assert all(a is b for a, b in tensors)
    assert shared.config is not model.config


@pytest.mark.parametrize(
    ("changes", "constant"),
    [
        ({"num_experts_per_tok": 1, "norm_topk_prob": True}, True),
        ({"num_experts_per_tok": 1, "norm_topk_prob": False}, False),
        ({"num_experts_per_tok": 2, "norm_topk_prob": True}, False),
    ],
)
def test_constant_gates_are_recognised_also_without_weights(
    changes: dict[str, Any], constant: bool
) -> None:
    model = tiny("qwen3_moe", **changes)
    on_meta = MoEModel(build("qwen3_moe", num_experts=8, moe_intermediate_size=8, **changes))
    assert model.layers[0].gates_are_constant() is constant
    assert on_meta.layers[0].gates_are_constant() is constant
