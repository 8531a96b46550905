"""Quantised form: every expert's matrices as integer codes of its own bit width, group by group.

A matrix W (out, in) with b bits and groups of G numbers along `in` (the last one may be shorter) is

    W ~ (codes - zero) * scale,    codes in 0 .. 2^b - 1,    scale, zero (out, ceil(in / G)).

One bit stores no zero: it is 1/2, so that W ~ +-scale/2. Sixteen bits are the dense matrix itself.
Experts of equal width lie in one stack, in ascending order; scale and zero are numbers in the
experts' dtype. The codes of one matrix form a bit stream, row by row: code i takes the bits from
b i on, lowest first, and the last byte is filled with zeros. Biases stay dense.
"""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.experts.base import BankSpec, Stored
from rerail.experts.encoded import EncodedExperts
from rerail.moe.fused_experts import Dims

DENSE = 16


class Coded(NamedTuple):
    """A stack of quantised matrices: codes (..., out, in), scale and zero (..., out, groups)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes (..., n) below 2^bits as uint8 (..., ceil(n bits / 8))."""
    per_word, size, word = _word(bits)
    *lead, n = codes.shape
    # a word is the fewest codes that end on a byte: 8 of 3 bits in 3 bytes, 4 of 2 bits in one
    padded = F.pad(codes.to(word), (0, -n % per_word))
    parts = padded.reshape(*lead, padded.shape[-1] // per_word, per_word)
    words = (parts << _steps(per_word, bits, parts)).sum(dim=-1, keepdim=True, dtype=word)
    split = (words >> _steps(size, 8, words)) & 255
    return split.to(torch.uint8).flatten(-2)[..., : -(-n * bits // 8)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the n codes (uint8) that `pack` was given: its inverse."""
    if bits == 8:
        return packed[..., :n]
    per_word, size, _ = _word(bits)
    padded = F.pad(packed, (0, -packed.shape[-1] % size)) if size > 1 else packed
    groups = padded.reshape(*padded.shape[:-1], padded.shape[-1] // size, size)
    # a word that has a byte for each code, its codes still close together
    word = groups[..., 0].to(
        {2: torch.int16, 4: torch.int32, 8: torch.int64}[per_word],
        memory_format=torch.contiguous_format,
    )
    for byte in range(1, size):
        word |= groups[..., byte].to(word.dtype) << 8 * byte
    codes = per_word // 2
    while codes:  # halves move apart, then halves of these, until every code is a byte
        mask = sum((2 ** (bits * codes) - 1) << at for at in range(0, 8 * per_word, 8 * codes))
        word |= word << (8 - bits) * codes
        word &= mask
        codes //= 2
    flat: Tensor = word.view(torch.uint8)[..., :n]
    return flat


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """Return the codes and the bytes of the shortest whole word, and a dtype that holds it."""
    size = bits // gcd(bits, 8)
    word = torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64
    return 8 // gcd(bits, 8), size, word


def _steps(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * step, step, dtype=like.dtype, device=like.device)


def dequantised(coded: Coded, group: int) -> Tensor:
    """Return (codes - zero) * scale, (..., out, in), in float32 or wider."""
    return scaled(*coded, group)


def scaled(codes: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Tensor:
    """Return `dequantised` numbers; no zero is 0."""
    wide, width = torch.promote_types(scale.dtype, torch.float32), codes.shape[-1]
    padded = F.pad(codes, (0, -width % group)) if width % group else codes
    # a copy and then in place: an operation on integers and floats together is slower
    grouped = padded.reshape(*padded.shape[:-1], padded.shape[-1] // group, group)
    made: Tensor = grouped.to(wide, copy=True)
    if zero is not None:
        made -= zero.to(wide).unsqueeze(-1)
    return made.mul_(scale.to(wide).unsqueeze(-1)).flatten(-2)[..., :width]


def rows_at(places: Sequence[int]) -> slice | list[int]:
    """Return an index of ascending places: neighbours are read where they lie, others gathered."""
    first, last = places[0], places[-1]
    return slice(first, last + 1) if last - first == len(places) - 1 else list(places)


def buckets(spec: BankSpec) -> dict[int, list[int]]:
    """Return the experts of each bit width, ascending."""
    each = spec.each("bits")
    return {b: [e for e, own in enumerate(each) if own == b] for b in sorted(set(each))}


def _bits(stored: Stored, width: int) -> Stored:
    """Return 8 bits for a byte of codes, `width` for every other number."""
    names = cast(Mapping[tuple[int, str], int], stored)
    return {key: n * (8 if key[1].endswith(".codes") else width) for key, n in names.items()}


class QuantizedExperts(EncodedExperts):
    """Integers: `bits`, one for each expert, and `group`, the numbers that share a scale."""

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (out, inner) in dims.matrices.items():
            for bits, experts in buckets(spec).items():
                n, key = len(experts), f"{name}.b{bits}"
                if bits == DENSE:
                    shapes[f"{key}.dense"] = (n, out, inner)
                    continue
                groups = -(-inner // spec.integer("group"))
                shapes[f"{key}.codes"] = (n, -(-out * inner * bits // 8))
                shapes[f"{key}.scale"] = (n, out, groups)
                if bits > 1:
                    shapes[f"{key}.zero"] = (n, out, groups)
        return shapes

    @classmethod
    def predicted_bits(cls, spec: BankSpec, layer: int, dims: Dims, width: int) -> Stored:
        return _bits(cls.predicted(spec, layer, dims), width)

    @classmethod
    def used(cls, spec: BankSpec, dims: Dims, stored: Stored) -> tuple[float, float]:  # noqa: ARG003
        """Return the numbers that the codes of an expert stand for."""
        return 0, dims.expert

    def stored_bits(self, width: int) -> Stored:
        return _bits(self.stored(), width)

    def matrix(self, name: str, expert: int) -> Tensor:
        if (name, expert) in self.ready:
            return self.ready[name, expert]
        return self._decoded(name, self.spec.each("bits")[expert], [expert])[0]

    def prepared(self, experts: Sequence[int]) -> dict[tuple[str, int], Tensor]:
        """Decode the matrices of some experts together: fewer and longer operations."""
        made: dict[tuple[str, int], Tensor] = {}
        for bits, known in buckets(self.spec).items():
            if chosen := [e for e in experts if e in known]:
                for name in self.dims.matrices:
                    keys = [(name, e) for e in chosen]
                    made.update(zip(keys, self._decoded(name, bits, chosen), strict=True))
        return made

    def _decoded(self, name: str, bits: int, experts: list[int]) -> Tensor:
        """Return the matrices (n, out, in) of some experts of one width."""
        known, key = buckets(self.spec)[bits], f"{name}.b{bits}"
        rows = rows_at([known.index(e) for e in experts])
        if bits == DENSE:
            return self.solved(f"{key}.dense")[rows]
        scale, shape = self.solved(f"{key}.scale")[rows], self.dims.matrices[name]
        zero = self.solved(f"{key}.zero")[rows] if bits > 1 else torch.full_like(scale, 0.5)
        codes = unpack(self.solved(f"{key}.codes")[rows], bits, shape[0] * shape[1])
        coded = Coded(codes.view(*codes.shape[:-1], *shape), scale, zero)
        return dequantised(coded, self.spec.integer("group")).to(scale.dtype)
