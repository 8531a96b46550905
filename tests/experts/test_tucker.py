import pytest
import torch

from families import tiny
from rerail.experts.base import BankSpec, build_bank
from rerail.experts.tucker import TuckerExperts
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer

RANKS = {"gate": (8, 3, 5), "up": (3, 2, 4), "down": (8, 1, 2)}


def build(layer: MoELayer, **options: str) -> TuckerExperts:
    spec = BankSpec("tucker", 8, (), RANKS, options)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in TuckerExperts.shapes(spec, layer.dims).items()
    }
    return build_bank(spec, range(8), layer.index, {layer.index: layer.stock()}, tensors)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_every_expert_is_its_slice_between_the_layer_s_factors(family: str) -> None:
    bank = build(tiny(family).layers[0])
    for name in ("gate", "up", "down"):
        core, out, inner = (bank.solved(f"{name}.{part}") for part in ("core", "out", "in"))
        for e in range(8):
            own = core[e] if name != "up" else sum(
                float(bank.solved("up.expert")[e, a]) * core[a] for a in range(3)
            )  # fmt: skip
            torch.testing.assert_close(getattr(bank.materialise(e), name), out @ own @ inner.T)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_runs_answers_as_whole_experts_and_is_what_is_counted(family: str) -> None:
    layer = tiny(family).layers[0]
    bank, whole = build(layer), build(layer, run="materialised")
    x, index, weights = torch.randn(9, 16), torch.randint(0, 8, (9, 2)), torch.rand(9, 2)
    expected = whole(x, index, weights)
    scale = float(expected.abs().max())
    torch.testing.assert_close(bank(x, index, weights), expected, atol=1e-5 * scale, rtol=1e-4)
    counted = sum(p.numel() for p in bank.parameters())
    assert counted == sum(bank.stored().values()) == sum(whole.stored().values())
    assert bank.stored() == TuckerExperts.predicted(bank.spec, layer.index, layer.dims)
    own = {n: p for n, p in expert_parameters(layer.experts).items() if n.endswith("bias")}
    in_shell = dict(bank.shell.named_parameters())
    assert all(in_shell[n] is p for n, p in own.items())


def test_a_token_reads_shared_factors_once_and_slices_for_each_expert() -> None:
    layer = tiny("qwen3_moe").layers[0]
    bank, (p, d) = build(layer), (8, 16)
    gate = d * 5 + p * 3 + 2 * 3 * 5
    up = d * 4 + p * 2 + 3 * 2 * 4 + 2 * 3  # slices that all experts mix are read once
    down = p * 2 + d * 1 + 2 * 1 * 2
    assert bank.numbers_used(2) == gate + up + down
