import pytest
import torch

from families import tiny
from rerail.experts.base import BankSpec, build_bank
from rerail.experts.low_rank import LowRankExperts
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer

OWN = {"gate": (1, 2, 3, 4, 1, 2, 3, 4), "up": (2,) * 8, "down": (4, 3, 2, 1) * 2}
FORMS = {
    "own": (OWN, "own"),
    "shared": ({"gate": 3, "up": 5, "down": 2}, "shared"),
    "trimmed": ({"gate": 3, "up": 5, "down": 2, "distinct": 3}, "shared"),
}


def build(layer: MoELayer, form: str, **options: str) -> LowRankExperts:
    integers, rows = FORMS[form]
    spec = BankSpec("low_rank", 8, (), integers, {"rows": rows, **options})
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in LowRankExperts.shapes(spec, layer.dims).items()
    }
    return build_bank(spec, range(8), layer.index, {layer.index: layer.stock()}, tensors)


def expected(bank: LowRankExperts, form: str, name: str, i: int) -> torch.Tensor:
    u, v = bank.solved(f"{name}.U"), bank.solved(f"{name}.V")
    if form == "own":
        start = sum(OWN[name][:i])
        rows = slice(start, start + OWN[name][i])
        return u[:, rows] @ v[rows]
    if form == "shared":
        return u[i] @ v
    mix = bank.solved(f"{name}.mix")[i]
    return (mix[0] * u[0] + mix[1] * u[1] + mix[2] * u[2]) @ v


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "granitemoe"])
@pytest.mark.parametrize("form", FORMS)
def test_every_expert_is_the_formula_of_its_factors(family: str, form: str) -> None:
    bank = build(tiny(family).layers[0], form)
    for name in ("gate", "up", "down"):
        for i in range(8):
            actual = getattr(bank.materialise(i), name)
            torch.testing.assert_close(actual, expected(bank, form, name, i))
            assert actual.dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("form", FORMS)
def test_stored_and_materialised_agree_and_count_the_same(family: str, form: str) -> None:
    layer = tiny(family).layers[0]
    whole, bank = build(layer, form, run="materialised"), build(layer, form)
    x, index, weights = torch.randn(9, 16), torch.randint(0, 8, (9, 2)), torch.rand(9, 2)
    torch.testing.assert_close(
        bank(x, index, weights), whole(x, index, weights), atol=1e-2, rtol=1e-4
    )
    counted = sum(p.numel() for p in bank.parameters())
    assert counted == sum(bank.stored().values()) == sum(whole.stored().values())
    assert bank.stored() == LowRankExperts.predicted(bank.spec, layer.index, layer.dims)


def test_a_factored_forward_is_the_materialised_one() -> None:
    layer = tiny("qwen3_moe").layers[0]
    bank = build(layer, "shared")
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)) / 8
    part = {n: (bank.solved(f"{n}.U")[6], bank.solved(f"{n}.V")) for n in ("gate", "up", "down")}
    gate, up = (x @ part[n][1].T @ part[n][0].T for n in ("gate", "up"))
    h = torch.nn.functional.silu(gate) * up
    actual = bank(x, torch.full((5, 1), 6), torch.ones(5, 1))
    expected = h @ part["down"][1].T @ part["down"][0].T
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_biases_stay_the_layers_own() -> None:
    layer = tiny("gpt_oss").layers[0]
    stock, bank = expert_parameters(layer.experts), build(layer, "own")
    in_shell = dict(bank.shell.named_parameters())
    assert all(in_shell[n] is p for n, p in stock.items() if n.endswith("bias"))
    biases = {n: p.numel() for n, p in stock.items() if n.endswith("bias")}
    assert {n: c for (_, n), c in bank.stored().items() if n.endswith("bias")} == biases


def test_stored_numbers_are_those_of_the_form() -> None:
    layer = tiny("qwen3_moe").layers[0]
    assert sum(build(layer, "own").stored().values()) == (20 + 16 + 20) * (8 + 16)
    assert sum(build(layer, "shared").stored().values()) == 8 * (8 * 8 + 16) + 2 * (8 * 16 + 8)
    trimmed = 8 * (3 * 8 + 16) + 2 * (3 * 16 + 8) + 3 * 8 * 3
    assert sum(build(layer, "trimmed").stored().values()) == trimmed
