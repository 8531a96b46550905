"""Puzzle form: words, flags and codes of pairs, exactly as they are packed."""

import itertools
import re

import pytest
import torch

from families import CONFIGS, tiny
from rerail.errors import InputError
from rerail.experts.base import BankSpec, build_bank
from rerail.experts.puzzle import (
    PuzzleExperts,
    Shared,
    decoded_words,
    pack_trits,
    tensors_of,
    unpack_trits,
    words_of,
)
from rerail.experts.quantized import Coded, dequantised, unpack
from rerail.moe.model import MoELayer

PAIRS = (6, 1, 3, 4)
WHOLE = (6, 1, 3, 4, 0, 2, 7, 5)


def every_word() -> Shared:
    """Return all signs, masks, exponents and mantissas that a word can hold, in one matrix."""
    flags = torch.tensor(list(itertools.product((False, True), repeat=4)))
    flags = flags[flags[:, 2] | flags[:, 3]]  # an element that both leave out is zero
    numbers = (torch.arange(32 * 128) + (112 << 7)).to(torch.int16).view(torch.bfloat16)
    each = flags.T.unsqueeze(-1).expand(4, 12, len(numbers))
    return Shared(numbers.expand(1, 12, -1), each[:2].unsqueeze(1), each[2:].unsqueeze(1))


def random_pairs(pairs: int, out: int, inner: int, dtype=torch.float32, seed: int = 0) -> Shared:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(pairs, out, inner, generator=generator).to(torch.bfloat16).to(dtype)
    flags = torch.rand(4, pairs, out, inner, generator=generator) < 0.6
    masks = torch.stack([flags[2] | ~flags[3], flags[3]])
    return Shared(numbers, flags[:2], masks)


def signed(shared: Shared, position: int) -> torch.Tensor:
    """Return the formula (-1)^s m M."""
    sign = 1 - 2 * shared.signs[position].to(shared.magnitude)
    return sign * shared.masks[position] * shared.magnitude


def spec_of(store: str, pairs: tuple[int, ...] = PAIRS, **options: str) -> BankSpec:
    sizes = {"pairs": pairs} | ({"bits": 3, "group": 5} if store == "codes" else {})
    return BankSpec("puzzle", 8, (), sizes, {"store": store, **options})


def build(layer: MoELayer, spec: BankSpec) -> tuple[PuzzleExperts, dict[str, Shared]]:
    shared, tensors = {}, {}
    paired = spec.each("pairs")
    rest = [e for e in range(8) if e not in paired]
    for name, stack in layer.stack()._asdict().items():
        shared[name] = random_pairs(len(paired) // 2, *stack.shape[1:])
        parts = tensors_of(shared[name], spec, stack.dtype, name)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        tensors[f"{name}.dense"] = stack[rest]
    stocks = {layer.index: layer.stock()}
    return build_bank(spec, range(8), layer.index, stocks, tensors), shared


def test_every_word_comes_back() -> None:
    shared = every_word()
    words = words_of(shared)
    assert words.dtype == torch.int16
    assert words.unique().numel() == words.numel() == 49152
    for position in (0, 1):
        found = decoded_words(words, position)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, signed(shared, position))
        assert not found[~shared.masks[position]].signbit().any(), "what is left out is +0"


def test_the_bits_of_a_word_are_where_the_paper_puts_them() -> None:
    one = torch.ones(1, 1, 1)
    no, yes = torch.zeros(1, 1, 1).bool(), torch.ones(1, 1, 1).bool()
    word = int(words_of(Shared(1.5 * one, torch.stack([yes, no]), torch.stack([no, yes])))) & 0xFFFF
    assert f"{word:016b}" == "1001011111000000"


def test_small_magnitudes_are_raised_by_no_more_than_the_least_number() -> None:
    tiny_numbers = torch.logspace(-12, -4.6, 500).view(1, 1, -1)
    flags = torch.ones(2, *tiny_numbers.shape).bool()
    found = decoded_words(words_of(Shared(tiny_numbers, flags, flags)), 0).abs()
    assert ((found - tiny_numbers).abs() < 2**-14).all()
    assert (found >= 2**-15).all()


@pytest.mark.parametrize("value", [2.0**17, 1e9, torch.inf, torch.nan])
def test_a_magnitude_that_does_not_fit_is_named(value: float) -> None:
    shared = random_pairs(2, 3, 4)
    shared.magnitude[1, 2, 1] = value
    named = re.escape(
        f"up of experts 3 and 4 holds the magnitude {value:g}, which cannot be packed"
    )
    with pytest.raises(InputError, match=named):
        tensors_of(shared, spec_of("words"), torch.float32, "layer 5: up")
    assert tensors_of(shared, spec_of("float"), torch.float32, "layer 5: up")
    shared.magnitude[1, 2, 1] = 2.0**17 - 512
    assert tensors_of(shared, spec_of("words"), torch.float32, "layer 5: up")


@pytest.mark.parametrize("n", [1, 4, 5, 6, 23])
def test_trits_come_back_five_to_a_byte(n: int) -> None:
    trits = torch.randint(0, 3, (2, 3, n), generator=torch.Generator().manual_seed(n))
    packed = pack_trits(trits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, -(-n // 5))
    assert torch.equal(unpack_trits(packed, n).long(), trits)
    assert int(pack_trits(torch.full((5,), 2))) == 242


@pytest.mark.parametrize("store", ["words", "float", "codes"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_every_expert_is_the_formula_of_its_pair_or_itself(family: str, store: str) -> None:
    layer = tiny(family).layers[0]
    bank, shared = build(layer, spec_of(store))
    for e in range(8):
        for name, own in layer.expert(e)._asdict().items():
            found = getattr(bank.materialise(e), name)
            if e not in PAIRS:
                assert torch.equal(found, own)
                continue
            pair, position = divmod(PAIRS.index(e), 2)
            expected = signed(shared[name], position)[pair]
            if store != "codes":
                assert torch.equal(found, expected)
                continue
            assert torch.equal(found != 0, (expected != 0) & (found != 0))
            for piece, whole in zip(found.split(5, -1), expected.split(5, -1), strict=True):
                top = shared[name].magnitude.amax() / 7
                assert ((piece - whole).abs() <= top / 2 + 1e-6).all()


def test_words_are_the_float_form_rounded_to_bfloat16() -> None:
    layer = tiny("qwen3_moe").layers[0]
    words, floats = (build(layer, spec_of(store))[0] for store in ("words", "float"))
    for name, tensor in floats.dense().items():
        assert torch.equal(words.dense()[name], tensor)


@pytest.mark.parametrize("store", ["words", "float", "codes"])
@pytest.mark.parametrize("family", CONFIGS)
def test_integers_stay_integers_and_the_experts_follow_the_models_dtype(family, store) -> None:
    bank, _ = build(tiny(family).layers[0], spec_of(store, WHOLE))
    before = {n: p.dtype for n, p in bank.named_parameters() if not p.is_floating_point()}
    assert len(before) == {"words": 3, "float": 3, "codes": 9}[store]
    bank.to(torch.float64)
    assert {n: bank.get_parameter(n).dtype for n in before} == before
    assert bank.dense()["down_proj"].dtype == torch.float64


@pytest.mark.parametrize("pairs", [PAIRS, WHOLE, ()])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bits_are_counted_to_the_byte(family: str, pairs: tuple[int, ...]) -> None:
    layer = tiny(family).layers[0]
    size = 3 * layer.hidden_size * layer.intermediate_size
    biases = 8 * (layer.expert_size - size)
    alone, p = 8 - len(pairs), len(pairs) // 2
    sums = {s: sum(build(layer, spec_of(s, pairs))[0].stored_bits(16).values()) for s in STORES}
    assert sums["words"] == 16 * (size * (alone + p) + biases)
    assert sums["float"] == 16 * (size * alone + biases) + 20 * size * p
    codes, groups = 0, 0
    for out, inner in layer.dims.matrices.values():
        codes += 8 * (-(-out * inner * 3 // 8) - (-out * inner // 4) - (-out * inner // 5))
        groups += out * -(-inner // 5)
    assert sums["codes"] == 16 * (size * alone + biases) + p * (codes + 16 * groups)
    for store in STORES:
        bank, _ = build(layer, spec_of(store, pairs))
        assert bank.stored_bits(32) == PuzzleExperts.predicted_bits(
            bank.spec, layer.index, layer.dims, 32
        )


STORES = ("words", "float", "codes")


@pytest.mark.parametrize("pairs", [(1, 2, 3), (1, 1), (0, 8), (-1, 2)])
def test_pairs_that_are_none_are_refused(pairs: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"an even number of distinct ones below 8"):
        PuzzleExperts.shapes(spec_of("words", pairs), tiny("qwen3_moe").layers[0].dims)


@pytest.mark.parametrize("experts", [[1, 3, 6], [0, 3, 4, 5], [1]])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_codes_decoded_together_are_the_formula_of_each(bits: int, experts: list[int]) -> None:
    layer = tiny("qwen3_moe").layers[0]
    integers = {"pairs": PAIRS, "bits": bits, "group": 5}
    spec = BankSpec("puzzle", 8, (), integers, {"store": "codes"})
    bank, shared = build(layer, spec)
    made = bank.prepared(experts)
    assert set(made) == {(n, e) for n in shared for e in experts if e in PAIRS}
    for (name, e), found in made.items():
        pair, position = divmod(PAIRS.index(e), 2)
        shape = found.shape
        codes = unpack(bank.solved(f"{name}.codes")[pair], bits, found.numel()).view(shape)
        scale = bank.solved(f"{name}.scale")[pair]
        magnitude = dequantised(Coded(codes, scale, torch.zeros_like(scale)), 5)
        sign = 1 - 2 * shared[name].signs[position][pair].float()
        assert torch.equal(found, magnitude * sign * shared[name].masks[position][pair])
        assert torch.equal(found, bank.matrix(name, e))
        bank.ready = {(name, e): found + 1}
        assert torch.equal(bank.matrix(name, e), found + 1), "what is ready is what is used"
        bank.ready = {}
