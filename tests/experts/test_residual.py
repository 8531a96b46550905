import pytest
import torch

from families import tiny
from rerail.experts.base import BankSpec, build_bank
from rerail.experts.residual import ResidualExperts, by_matrix, largest, mask_bits, mask_words
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer

SPARSE = ({"values": 70}, {"residual": "sparse"})
LOW = ({"rank": (1, 2, 3, 4, 1, 2, 3, 4)}, {"residual": "low_rank"})


def build(layer: MoELayer, form: tuple, **options: str) -> ResidualExperts:
    integers, words = form
    biased = "gate_up_proj_bias" in layer.dims.numbers
    words = {**words, **({"biases": "gate+up"} if biased else {}), **options}
    spec, generator = BankSpec("residual", 8, (), integers, words), torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in ResidualExperts.shapes(spec, layer.dims).items()
    }
    if "mask" in tensors:
        entries = torch.randn(8, *tensors["base"].shape, generator=generator).double()
        tensors["mask"], tensors["values"] = largest(entries, 70)
    return build_bank(spec, range(8), layer.index, {layer.index: layer.stock()}, tensors)


def expected(bank: ResidualExperts, e: int) -> torch.Tensor:
    """Return gate, up and down^T (3, I, H) of an expert, one bit at a time."""
    base = bank.solved("base")
    if bank.spec.options["residual"] == "sparse":
        own, values = torch.zeros(3, base[0].numel()), iter(bank.solved("values")[e])
        for at, words in enumerate(bank.solved("mask")[e].tolist()):
            for i, word in enumerate(words):
                for bit in range(16):
                    if word >> bit & 1:
                        own[at, 16 * i + bit] = next(values)
        return base + own.view(base.shape)
    start = sum(LOW[0]["rank"][:e])
    rows = slice(start, start + LOW[0]["rank"][e])
    return base + bank.solved("U")[:, rows] @ bank.solved("V")[:, rows]


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_masks_survive_words(n: int) -> None:
    bits = torch.rand(5, n, generator=torch.Generator().manual_seed(n)) < 0.5
    words = mask_words(bits)
    assert words.dtype == torch.int16
    assert words.shape == (5, -(-n // 16))
    assert torch.equal(mask_bits(words, n), bits)
    for row, word in zip(bits, words[:, 0].tolist(), strict=True):
        assert word % 2**16 == sum(int(b) << i for i, b in enumerate(row[:16].tolist()))


def test_the_largest_entries_are_stored_in_their_order() -> None:
    rows = torch.tensor([[[1.0, -5], [2, 0], [0, 3]], [[0, 0], [0, -1], [1, 0]]]).unsqueeze(-1)
    mask, values = largest(rows, 2)
    assert mask.shape == (2, 3, 1)
    assert mask_bits(mask, 2).int().tolist() == [[[0, 1], [0, 0], [0, 1]], [[0, 0], [0, 1], [1, 0]]]
    assert values.tolist() == [[-5, 3], [-1, 1]]


def test_rows_of_a_cloud_are_those_of_its_matrices() -> None:
    cloud = torch.arange(24.0).view(2, 12)
    assert torch.equal(torch.cat(list(by_matrix(cloud)), dim=1), cloud)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("form", [SPARSE, LOW])
def test_every_expert_is_the_centre_plus_its_residual(family: str, form: tuple) -> None:
    bank = build(tiny(family).layers[0], form)
    for e in range(8):
        gate, up, down = bank.materialise(e)
        torch.testing.assert_close(torch.stack([gate, up, down.T]), expected(bank, e))


@pytest.mark.parametrize("form", [SPARSE, LOW])
def test_biases_of_channels_go_with_them(form: tuple) -> None:
    layer = tiny("gpt_oss").layers[0]
    bank = build(layer, form)
    fused = bank.dense()
    assert torch.equal(fused["gate_up_proj_bias"][:, ::2], bank.solved("gate_bias"))
    assert torch.equal(fused["gate_up_proj_bias"][:, 1::2], bank.solved("up_bias"))
    own = expert_parameters(layer.experts)
    assert dict(bank.shell.named_parameters())["down_proj_bias"] is own["down_proj_bias"]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("form", [SPARSE, LOW])
def test_what_runs_answers_as_whole_experts_and_is_what_is_counted(
    family: str, form: tuple
) -> None:
    layer = tiny(family).layers[0]
    bank, whole_bank = build(layer, form), build(layer, form, run="materialised")
    x, index, weights = torch.randn(9, 16), torch.randint(0, 8, (9, 2)), torch.rand(9, 2)
    whole = whole_bank(x, index, weights)
    scale = float(whole.abs().max())
    torch.testing.assert_close(bank(x, index, weights), whole, atol=1e-5 * scale, rtol=1e-4)
    counted = sum(p.numel() for p in bank.parameters())
    assert counted == sum(bank.stored().values()) == sum(whole_bank.stored().values())
    assert bank.stored() == ResidualExperts.predicted(bank.spec, layer.index, layer.dims)
    for width in (16, 32):
        predicted = ResidualExperts.predicted_bits(bank.spec, layer.index, layer.dims, width)
        assert bank.stored_bits(width) == whole_bank.stored_bits(width) == predicted
        mask = [bits for (_, name), bits in predicted.items() if name == "mask"]
        assert mask == ([8 * 384 // 16 * 16] if form is SPARSE else [])


def test_sums_are_rounded_once() -> None:
    layer = tiny("qwen3_moe").layers[0]
    layer.experts.to(torch.bfloat16)
    bank = build(layer, LOW)
    exact = expected(bank.float(), 3)
    gate = bank.bfloat16().materialise(3).gate
    assert torch.equal(gate, exact[0].to(torch.bfloat16))
