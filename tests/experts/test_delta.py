import pytest
import torch

from families import tiny
from rerail.experts.base import BankSpec, build_bank
from rerail.experts.delta import DeltaExperts
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer

OWN = {"gate": (1, 2, 3, 4, 1, 2, 3, 4), "up": (2,) * 8, "down": (4, 3, 2, 1) * 2}
CHANNELS = (0, 2, 3, 6, 7)
FORMS = {
    "own": (OWN, "own"),
    "shared": ({"gate": 3, "up": 5, "down": 2}, "shared"),
    "narrow": ({**OWN, "channels": CHANNELS}, "own"),
    "narrow_shared": ({"gate": 3, "up": 5, "down": 2, "channels": CHANNELS}, "shared"),
}


def build(layer: MoELayer, form: str, **options: str) -> DeltaExperts:
    integers, rows = FORMS[form]
    spec = BankSpec("delta", 8, (), integers, {"rows": rows, **options})
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in DeltaExperts.shapes(spec, layer.dims).items()
    }
    return build_bank(spec, range(8), layer.index, {layer.index: layer.stock()}, tensors)


def expected(bank: DeltaExperts, name: str, i: int) -> torch.Tensor:
    base, u, v = (bank.solved(f"{name}.{part}") for part in ("base", "U", "V"))
    if bank.spec.options["rows"] == "shared":
        return base + u[i] @ v
    start = sum(OWN[name][:i])
    rows = slice(start, start + OWN[name][i])
    return base + u[:, rows] @ v[rows]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("form", FORMS)
def test_every_expert_is_base_plus_factors(family: str, form: str) -> None:
    layer = tiny(family).layers[0]
    bank, narrow = build(layer, form), form.startswith("narrow")
    for name in ("gate", "up", "down"):
        for i in range(8):
            actual, made = getattr(bank.materialise(i), name), expected(bank, name, i)
            if narrow:
                full = torch.zeros_like(actual)
                at = list(CHANNELS)
                full[(slice(None), at) if name == "down" else at] = made
                made = full
            torch.testing.assert_close(actual, made)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("form", FORMS)
def test_stored_and_materialised_agree_and_count_the_same(family: str, form: str) -> None:
    layer = tiny(family).layers[0]
    whole, bank = build(layer, form, run="materialised"), build(layer, form)
    x, index, weights = torch.randn(9, 16), torch.randint(0, 8, (9, 2)), torch.rand(9, 2)
    torch.testing.assert_close(
        bank(x, index, weights), whole(x, index, weights), atol=1e-2, rtol=1e-4
    )
    assert torch.isfinite(bank(x, index, weights)).all()
    counted = sum(p.numel() for p in bank.parameters())
    assert counted == sum(bank.stored().values()) == sum(whole.stored().values())
    assert bank.stored() == DeltaExperts.predicted(bank.spec, layer.index, layer.dims)
    own = {n: p for n, p in expert_parameters(layer.experts).items() if n.endswith("bias")}
    in_shell = dict(whole.shell.named_parameters())
    assert all(in_shell[n] is p for n, p in own.items())


def test_dropped_channels_are_not_stored() -> None:
    layer = tiny("qwen3_moe").layers[0]
    whole, narrow = build(layer, "own"), build(layer, "narrow")
    assert sum(whole.stored().values()) == 3 * 8 * 16 + 56 * (8 + 16)
    assert sum(narrow.stored().values()) == 3 * 5 * 16 + 56 * (5 + 16)
