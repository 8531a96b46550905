"""Narrow form: ragged widths that answer as experts whose dropped channels are zero."""

import pytest
import torch

from families import tiny
from rerail.compress.templates.narrower import narrowed
from rerail.experts.base import build_bank
from rerail.experts.narrow import NarrowExperts
from rerail.moe.fused_experts import ExpertWeights, expert_parameters, shell_of
from rerail.moe.model import MoELayer

FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral"]


def ragged(layer: MoELayer) -> torch.Tensor:
    """Return kept channels (E, I): all of expert 0, none of expert 3, random ones elsewhere."""
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(8, layer.intermediate_size, generator=generator) < 0.5
    kept[0], kept[3] = True, False
    return kept


def build(layer: MoELayer, kept: torch.Tensor, **options: str) -> NarrowExperts:
    spec, tensors = narrowed(layer, kept)
    spec.options.update(options)
    return build_bank(spec, range(8), layer.index, {layer.index: layer.stock()}, tensors)


def asked(layer: MoELayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = 3 * torch.randn(40, layer.hidden_size, generator=generator)
    index = torch.randint(0, 8, (40, 2), generator=generator)
    return hidden, index, torch.rand(40, 2, generator=generator)


def zeroed(layer: MoELayer, kept: torch.Tensor) -> torch.nn.Module:
    """Return the stock experts with the down columns of dropped channels set to zero."""
    gate, up, down = layer.stack()
    fused = layer.layout.pack(ExpertWeights(gate, up, down * kept.unsqueeze(1)))
    return shell_of(layer.experts, {"down_proj": fused["down_proj"]}, 8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("run", ["materialised", "stored"])
def test_dropping_channels_answers_as_zeroing_them(family: str, run: str) -> None:
    layer = tiny(family).layers[0]
    kept = ragged(layer)
    bank, expected = build(layer, kept, run=run), zeroed(layer, kept)
    torch.testing.assert_close(bank(*asked(layer)), expected(*asked(layer)), atol=1e-5, rtol=1e-5)
    assert (bank(*asked(layer)) - layer.experts(*asked(layer))).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_of_saturated_channels_adds_exactly_nothing(family: str) -> None:
    layer = tiny(family).layers[0]
    kept = torch.ones(8, layer.intermediate_size, dtype=torch.bool)
    kept[1:] = False  # expert 0 sets the running width: all of the others is padding
    bank = build(layer, kept)
    hidden, _, weights = asked(layer)
    index = torch.full((40, 2), 5)
    bias = expert_parameters(layer.experts).get("down_proj_bias", torch.zeros(8, 16))[5]
    expected = (weights.unsqueeze(-1) * bias).sum(dim=1)
    torch.testing.assert_close(bank(100 * hidden, index, weights), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stored_channel_is_the_teachers_triplet(family: str) -> None:
    layer = tiny(family).layers[0]
    kept = ragged(layer)
    bank, (gate, up, down) = build(layer, kept), layer.stack()
    row = 0
    for e, j in kept.nonzero().tolist():
        assert torch.equal(bank.solved("gate")[row], gate[e, j])
        assert torch.equal(bank.solved("up")[row], up[e, j])
        assert torch.equal(bank.solved("down")[row], down[e, :, j])
        if family == "gpt_oss":
            bias = layer.experts.gate_up_proj_bias[e]
            assert bank.solved("gate_bias")[row] == bias[2 * j]
            assert bank.solved("up_bias")[row] == bias[2 * j + 1]
        row += 1
    assert row == len(bank.solved("gate")) == sum(bank.spec.each("widths"))


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_kept_channels(family: str) -> None:
    layer = tiny(family).layers[0]
    kept = ragged(layer)
    bank = build(layer, kept)
    biased = family == "gpt_oss"
    formula = int(kept.sum()) * (3 * 16 + 2 * biased) + biased * 8 * 16
    assert sum(bank.stored().values()) == formula
    assert bank.stored() == NarrowExperts.predicted(bank.spec, layer.index, layer.dims)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_no_wider_than_it_must_and_is_whole_as_stock(family: str) -> None:
    layer = tiny(family).layers[0]
    kept = torch.zeros(8, layer.intermediate_size, dtype=torch.bool)
    kept[:, :3] = True
    kept[2] = False
    bank = build(layer, kept, run="materialised")
    shape = bank.shell.down_proj.shape
    assert sorted(shape[1:]) == [4, 16]  # 3 channels in whole runs of 16 bytes
    stock = bank.as_stock()
    assert stock.down_proj.shape == layer.experts.down_proj.shape
    torch.testing.assert_close(stock(*asked(layer)), bank(*asked(layer)), atol=1e-5, rtol=1e-5)
    assert bank.uniform is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_width_is_seen_and_fuses_to_a_stock_module(family: str) -> None:
    layer = tiny(family).layers[0]
    kept = torch.zeros(8, layer.intermediate_size, dtype=torch.bool)
    kept[:4, :4], kept[4:, 3:7] = True, True
    bank = build(layer, kept)
    assert bank.uniform == 4
    small = shell_of(layer.experts, bank.fused(4), 8)
    assert sorted(small.down_proj.shape[1:]) == [4, 16]
    torch.testing.assert_close(small(*asked(layer)), bank(*asked(layer)), atol=1e-5, rtol=1e-5)


def test_what_has_no_channels_stays_the_teachers_own() -> None:
    layer = tiny("gpt_oss").layers[0]
    bank = build(layer, ragged(layer))
    assert bank.shell.down_proj_bias is layer.experts.down_proj_bias
