"""Puzzle form: two experts share one array of magnitudes; signs and masks are their own.

For a pair (i, j) and each matrix (out, in), with M >= 0, signs s and masks m (PuzzleMoE, arXiv
2511.04805, section 3.2),

    W_i ~ (-1)^(s_i) m_i M,    W_j ~ (-1)^(s_j) m_j M.

Option `store` says how P pairs are stored:

    words   one int16 an element: bit 15 s_i, 14 s_j, 13 m_i, 12 m_j, 11-7 the exponent of bfloat16
            M minus 112, 6-0 its mantissa. Integers, since as bfloat16 they would look like weights.
    float   M in the experts' dtype, and `flags` of 4 bits: s_i, s_j, m_i, m_j
    codes   M ~ codes * scale, of b bits and with one scale for each G numbers of a row; `signs` of
            2 bits; `masks` in base 3 (both, i, j), five to a byte

`dense` are the experts in no pair, in ascending order. Biases stay dense, each expert's own.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.errors import InputError
from rerail.experts.base import BankSpec, Stored
from rerail.experts.encoded import EncodedExperts
from rerail.experts.quantized import pack, rows_at, scaled, unpack
from rerail.moe.fused_experts import Dims

LOWEST, HIGHEST = 112, 143  # exponents of bfloat16 that fit five bits
_FIXED_BITS = {"words": 16, "flags": 8, "codes": 8, "signs": 8, "masks": 8}


class Shared(NamedTuple):
    """P pairs of one matrix: magnitude (P, out, in), signs and masks bool (2, P, out, in)."""

    magnitude: Tensor
    signs: Tensor
    masks: Tensor


def words_of(shared: Shared) -> Tensor:
    """Return int16 words of magnitudes below 2^17; exponents below 112 are raised to it."""
    bits = shared.magnitude.to(torch.bfloat16).view(torch.int16).int()
    words = ((bits >> 7).clamp(min=LOWEST) - LOWEST << 7) | (bits & 127)
    for shift, flag in zip((15, 14, 13, 12), (*shared.signs, *shared.masks), strict=True):
        words |= flag.int() << shift
    return ((words ^ 0x8000) - 0x8000).to(torch.int16)  # the same 16 bits, as a signed integer


def check_packable(magnitude: Tensor, pairs: Sequence[int], name: str) -> None:
    """Check that magnitudes (P, out, in) of pairs fit into words; `name` is for the message.

    Raises:
        InputError: one is 2^17 or more, or not finite.
    """
    bits = magnitude.to(torch.bfloat16).view(torch.int16).int() & 0x7FFF  # NaN may have a sign
    exponent = (bits >> 7).flatten(1).amax(dim=1)
    for pair in (exponent > HIGHEST).nonzero().flatten().tolist():
        both = f"{pairs[2 * pair]} and {pairs[2 * pair + 1]}"
        raise InputError(
            f"{name} of experts {both} holds the magnitude {float(magnitude[pair].max()):g}, which "
            f"cannot be packed into a word; allowed: below 2^{HIGHEST - 126}, or "
            "compressor.store=float"
        )


def decoded_words(words: Tensor, position: int) -> Tensor:
    """Return the matrix of the first (0) or second (1) expert of a pair, bfloat16."""
    # 16-bit integers all the way: a minus sign makes all bits of a mask
    bits = (words & 0x0FFF).add_(LOWEST << 7)
    bits |= (words << position) & -0x8000
    bits &= ((words >> (13 - position)) & 1).neg_()
    return bits.view(torch.bfloat16)


def tensors_of(shared: Shared, spec: BankSpec, dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    """Return the solved tensors of the pairs by the last part of their names.

    Args:
        shared: of all pairs of one matrix.
        spec: says how they are stored.
        dtype: of the experts.
        name: of what is stored, for the message.

    Raises:
        InputError: as `check_packable`.
    """
    (first, second), masks = shared.signs.to(torch.uint8), shared.masks
    if spec.options["store"] == "words":
        check_packable(shared.magnitude, spec.each("pairs"), name)
        return {"words": words_of(shared)}
    if spec.options["store"] == "float":
        bits = (first << 3) | (second << 2) | (masks[0].to(torch.uint8) << 1) | masks[1]
        return {"magnitude": shared.magnitude.to(dtype), "flags": pack(bits.flatten(1), 4)}
    bits, group = spec.integer("bits"), spec.integer("group")
    # a mean of rounded magnitudes has no sign: all codes are for numbers from 0 on
    pieces = torch.split(shared.magnitude, group, dim=-1)
    top = torch.cat([piece.amax(dim=-1, keepdim=True) for piece in pieces], dim=-1)
    scale = (top / (2**bits - 1)).to(dtype)
    each = torch.arange(shared.magnitude.shape[-1], device=top.device) // group
    step = torch.where(scale == 0, torch.ones_like(scale), scale).to(top.dtype)[..., each]
    codes = (shared.magnitude / step).round().clamp(max=2**bits - 1)
    trits = torch.where(masks[0], torch.where(masks[1], 0, 1), 2)
    return {
        "codes": pack(codes.flatten(1), bits),
        "scale": scale,
        "signs": pack(((first << 1) | second).flatten(1), 2),
        "masks": pack_trits(trits.flatten(1)),
    }


def pack_trits(trits: Tensor) -> Tensor:
    """Return numbers (..., n) of 0, 1 and 2 as uint8 (..., ceil(n / 5)), the first lowest."""
    padded = F.pad(trits.int(), (0, -trits.shape[-1] % 5))
    fives = padded.reshape(*padded.shape[:-1], padded.shape[-1] // 5, 5)
    packed: Tensor = (fives * _powers(padded)).sum(dim=-1).to(torch.uint8)
    return packed


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """Return the n numbers that `pack_trits` was given."""
    fives = packed.int().unsqueeze(-1) // _powers(packed) % 3
    return fives.to(torch.uint8).flatten(-2)[..., :n]


@functools.lru_cache(maxsize=4)
def _kept(device: torch.device) -> Tensor:
    """Return what each byte of masks leaves (256, 5): bit 0 for the first expert, 1 for the second.

    Divisions are slow, and comparisons of bytes are as well.
    """
    trits = unpack_trits(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1), 5)
    return torch.where(trits == 0, 3, trits).to(torch.int8)


@functools.lru_cache(maxsize=4)
def _factors(device: torch.device) -> Tensor:
    """Return the four factors +-1 of every byte of signs by position: (2, 256) words of int8."""
    every = torch.arange(256, dtype=torch.uint8, device=device)
    signs = torch.stack([unpack(every.unsqueeze(-1), 2, 4) >> shift & 1 for shift in (1, 0)])
    return (1 - 2 * signs.to(torch.int8)).view(torch.int32).squeeze(-1)


def _powers(like: Tensor) -> Tensor:
    return torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32, device=like.device)


def _signed(magnitude: Tensor, sign: Tensor, mask: Tensor) -> Tensor:
    kept = mask.to(torch.int8)
    return magnitude * (kept - 2 * (kept & sign.to(torch.int8))).to(magnitude.dtype)


def _puzzle_bits(stored: Stored, width: int) -> Stored:
    names = cast(Mapping[tuple[int, str], int], stored)
    return {k: n * _FIXED_BITS.get(k[1].rpartition(".")[2], width) for k, n in names.items()}


class PuzzleExperts(EncodedExperts):
    """Integers: `pairs`, the 2 P experts of the pairs; for `store: codes` `bits` and `group`."""

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        """Return shapes.

        Raises:
            InputError: `pairs` are not pairs of experts that the layer has.
        """
        paired = spec.each("pairs")
        if len(paired) % 2 or len(set(paired) & set(range(dims.experts))) < len(paired):
            raise InputError(
                f"a puzzle bank cannot pair the experts {list(paired)}; they must be an even "
                f"number of distinct ones below {dims.experts}"
            )
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (out, inner) in dims.matrices.items():
            parts = _pair_shapes(spec, len(paired) // 2, out, inner)
            parts["dense"] = (dims.experts - len(paired), out, inner)
            shapes |= {f"{name}.{part}": shape for part, shape in parts.items()}
        return shapes

    @classmethod
    def predicted_bits(cls, spec: BankSpec, layer: int, dims: Dims, width: int) -> Stored:
        return _puzzle_bits(cls.predicted(spec, layer, dims), width)

    @classmethod
    def used(cls, spec: BankSpec, dims: Dims, stored: Stored) -> tuple[float, float]:  # noqa: ARG003
        """Return the numbers that an expert's words stand for."""
        return 0, dims.expert

    def stored_bits(self, width: int) -> Stored:
        return _puzzle_bits(self.stored(), width)

    def matrix(self, name: str, expert: int) -> Tensor:
        paired, dense = self.spec.each("pairs"), self.solved(f"{name}.dense")
        if expert not in paired:
            return dense[expert - sum(other < expert for other in paired)]
        if (name, expert) in self.ready:
            return self.ready[name, expert]
        (pair, position), store = divmod(paired.index(expert), 2), self.spec.options["store"]
        if store == "words":
            return decoded_words(self.solved(f"{name}.words")[pair], position).to(dense.dtype)
        shape = (out, inner) = self.dims.matrices[name]
        if store == "float":
            flags = unpack(self.solved(f"{name}.flags")[pair], 4, out * inner).view(shape)
            magnitude = self.solved(f"{name}.magnitude")[pair]
            return _signed(magnitude, flags >> (3 - position) & 1, flags >> (1 - position) & 1)
        return self._coded(name, [expert])[0]

    def prepared(self, experts: Sequence[int]) -> dict[tuple[str, int], Tensor]:
        """Decode codes of some experts together: what a pair shares is read once for both."""
        chosen = [e for e in experts if e in self.spec.each("pairs")]
        if self.spec.options["store"] != "codes" or not chosen:
            return {}
        keys = [(name, e) for name in self.dims.matrices for e in chosen]
        made = [matrix for name in self.dims.matrices for matrix in self._coded(name, chosen)]
        return dict(zip(keys, made, strict=True))

    def _coded(self, name: str, experts: Sequence[int]) -> list[Tensor]:
        """Return a matrix (out, in) of each of some experts whose magnitudes are codes."""
        places = [divmod(self.spec.each("pairs").index(e), 2) for e in experts]
        pairs, bits = sorted({pair for pair, _ in places}), self.spec.integer("bits")
        rows = rows_at(pairs)
        codes, scale, signs, masks = (
            self.solved(f"{name}.{part}")[rows] for part in ("codes", "scale", "signs", "masks")
        )
        out, inner = self.dims.matrices[name]
        kept = F.embedding(masks.int(), _kept(masks.device)).flatten(1)[:, : out * inner]
        # bytes are multiplied faster than floats; eight bits and a sign are more than a byte
        magnitude = unpack(codes, bits, out * inner)
        magnitude = magnitude.view(torch.int8) if bits < 8 else magnitude.short()
        made = []
        for pair, position in places:
            at = pairs.index(pair)
            words = _factors(signs.device)[position].index_select(0, signs[at].int())
            signed = magnitude[at] * words.view(torch.int8)[: out * inner]
            signed *= kept[at] >> 1 if position else kept[at] & 1
            matrix = scaled(signed.view(out, inner), scale[at], None, self.spec.integer("group"))
            made.append(matrix.to(scale.dtype))
        return made


def _pair_shapes(spec: BankSpec, pairs: int, out: int, inner: int) -> dict[str, tuple[int, ...]]:
    store, whole, n = spec.options["store"], (pairs, out, inner), out * inner
    if store == "words":
        return {"words": whole}
    if store == "float":
        return {"magnitude": whole, "flags": (pairs, -(-n // 2))}
    groups = -(-inner // spec.integer("group"))
    return {
        "codes": (pairs, -(-n * spec.integer("bits") // 8)),
        "scale": (pairs, out, groups),
        "signs": (pairs, -(-n // 4)),
        "masks": (pairs, -(-n // 5)),
    }
