"""Packed channels: classes of bits inside each expert, to the byte."""

import pytest
import torch

import stored_forms as forms
from families import CONFIGS, tiny, tokens
from rerail.experts.base import BankSpec, build_bank
from rerail.experts.packed_channels import PackedChannels, channel_bits, channel_classes
from rerail.experts.quantized import Coded, dequantised, unpack
from rerail.moe.fused_experts import ExpertWeights, shell_of
from rerail.moe.model import MoELayer
from rerail.plan.apply import apply_plan

FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral", "granitemoe"]


def build(layer: MoELayer) -> tuple[PackedChannels, dict[str, torch.Tensor]]:
    """Return a bank of 16, 3 and 1 bits whose experts have 8, 5, 5, 0, 6, 1, 8 and 4 channels."""
    plan = forms.solved(apply_plan(tiny_of(layer), forms.Plan()), "packed_channels")
    part, tensors = plan.layers[0], plan.of_layer(0)
    bank = build_bank(part.bank, range(8), 0, {0: layer.stock()}, tensors)
    return bank, tensors


def tiny_of(layer: MoELayer):
    [family] = [f for f in CONFIGS if type(tiny(f).layers[0].block) is type(layer.block)]
    return tiny(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_channel_is_its_own_row_of_codes(family: str) -> None:
    layer = tiny(family).layers[0]
    bank, solved = build(layer)
    taken = {16: 0, 3: 0, 1: 0}
    for e in range(8):
        found, row = bank.materialise(e), 0
        for bits, widths in channel_classes(bank.spec).items():
            for _ in range(widths[e]):
                for name, matrix in found._asdict().items():
                    channel = matrix.mT[row] if name == "down" else matrix[row]
                    key, at = f"{name}.b{bits}", taken[bits]
                    if bits == 16:
                        assert torch.equal(channel, solved[f"{key}.dense"][at])
                        continue
                    scale = solved[f"{key}.scale"][at]
                    zero = solved[f"{key}.zero"][at] if bits > 1 else torch.full_like(scale, 0.5)
                    codes = unpack(solved[f"{key}.codes"][at], bits, 16)
                    torch.testing.assert_close(channel, dequantised(Coded(codes, scale, zero), 5))
                taken[bits] += 1
                row += 1
        assert not found.gate[row:].any()
        assert not found.down[:, row:].any()
    assert taken == {b: sum(w) for b, w in channel_classes(bank.spec).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_as_the_experts_that_it_stands_for(family: str) -> None:
    layer = tiny(family).layers[0]
    bank, solved = build(layer)
    fused = layer.layout.pack(
        ExpertWeights(*map(torch.stack, zip(*map(bank.materialise, range(8)), strict=True)))
    )
    if family == "gpt_oss":
        bias = torch.zeros(8, 16)
        row = 0
        for e, width in enumerate((8, 5, 5, 0, 6, 1, 8, 4)):
            bias[e, 0 : 2 * width : 2] = solved["gate_bias"][row : row + width]
            bias[e, 1 : 2 * width : 2] = solved["up_bias"][row : row + width]
            row += width
        fused["gate_up_proj_bias"] = bias
    plain = shell_of(layer.experts, fused, 8)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(40, 16, generator=generator)
    index, weights = torch.randint(0, 8, (40, 2), generator=generator), torch.rand(40, 2)
    torch.testing.assert_close(bank(x, index, weights), plain(x, index, weights))
    assert (bank(x, index, weights) - layer.experts(x, index, weights)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bits_are_counted_to_the_byte(family: str) -> None:
    layer = tiny(family).layers[0]
    bank, _ = build(layer)
    each = {16: 48 * 16, 3: 3 * (6 * 8 + 4 * 32), 1: 3 * (2 * 8 + 4 * 16)}
    assert {b: channel_bits(b, 16, 5) for b in each} == each
    assert channel_bits(0, 16, 5) == 0
    widths = channel_classes(bank.spec)
    expected = sum(sum(widths[b]) * bits for b, bits in each.items())
    if family == "gpt_oss":
        expected += 16 * (2 * sum(map(sum, widths.values())) + 8 * 16)
    assert sum(bank.stored_bits(16).values()) == expected
    predicted = PackedChannels.predicted_bits(bank.spec, 0, layer.dims, 32)
    assert bank.stored_bits(32) == predicted


@pytest.mark.parametrize("family", CONFIGS)
def test_codes_stay_bytes_and_the_experts_follow_the_models_dtype(family: str) -> None:
    bank, _ = build(tiny(family).layers[0])
    bank.to(torch.float64)
    codes = [p for n, p in bank.named_parameters() if n.endswith("codes")]
    assert len(codes) == 6
    assert all(p.dtype == torch.uint8 for p in codes)
    assert bank.dense()["gate_up_proj"].dtype == torch.float64


def test_gradients_reach_the_router_and_an_expert_without_channels_answers_nothing() -> None:
    teacher = tiny("qwen3_moe")
    student = apply_plan(teacher, forms.solved(teacher, "packed_channels"))
    rows = [layer.router_rows.requires_grad_() for layer in student.layers]
    student.model(tokens()).logits.square().mean().backward()
    assert all(row.grad.abs().max() > 0 for row in rows)
    x, index = torch.randn(4, 16), torch.full((4, 1), 3)
    assert not student.layers[0].experts(x, index, torch.ones(4, 1)).any()


def test_what_is_read_for_a_token_is_what_its_channels_stand_for() -> None:
    dims = tiny("gpt_oss").layers[0].dims
    full = {"bits": (4,), "widths": (8,) * 8, "group": 8}
    half = {**full, "widths": (4,) * 8}
    specs = [BankSpec("packed_channels", 8, (), i, {"biases": "gate+up"}) for i in (full, half)]
    used = [PackedChannels.used(spec, dims, {}) for spec in specs]
    assert used == [(0, dims.expert), (0, dims.expert - 4 * (3 * 16 + 2))]


@pytest.mark.parametrize("experts", [[0, 1, 2], [1, 4, 7], [2, 3, 4, 5], [3]])
def test_experts_decoded_together_are_what_each_is_alone(experts: list[int]) -> None:
    bank, _ = build(tiny("qwen3_moe").layers[0])
    made = bank.prepared(experts)
    assert len(made) == 3 * len(experts)
    for (name, e), rows in made.items():
        alone = getattr(bank.materialise(e), name)
        whole = alone.mT if name == "down" else alone
        assert torch.equal(rows, whole[: len(rows)])
        assert not whole[len(rows) :].any()
        bank.ready = {(name, e): rows + 1}
        used = bank.product(name, e, torch.eye(len(rows) if name == "down" else 16), None)
        assert torch.equal(used.mT if name != "down" else used, rows + 1), "it is what is used"
        bank.ready = {}
