"""Packed channels: the three vectors of a micro-expert share a bit width of their own.

Channel j of an expert is row j of gate, row j of up and column j of down, three vectors of length
H (CAMERA-Q, arXiv 2508.02322). Each expert's channels are put in the order of their classes, which
changes nothing. The channels of b bits of all experts lie one below the other, expert after expert:

    codes (S_b, ceil(H b / 8)),  scale (S_b, ceil(H / G)),  zero likewise where b > 1,

with S_b the sum of the class's widths, and rows coded as in `rerail.experts.quantized`. Sixteen
bits are `dense` rows. A channel in no class is gone, as in the narrow form. Biases of gate and up
follow their channels: gate_bias and up_bias (sum of all widths,), expert after expert.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.experts.base import BankSpec, Stored
from rerail.experts.encoded import EncodedExperts
from rerail.experts.quantized import DENSE, Coded, dequantised, unpack
from rerail.moe.fused_experts import Dims, decoded_product

_MIDDLE_BIAS = "gate_up_proj_bias"


def channel_classes(spec: BankSpec) -> dict[int, tuple[int, ...]]:
    """Return the widths of all experts by the bits of their class, the most bits first."""
    widths, experts = spec.each("widths"), spec.stored
    classes = enumerate(spec.each("bits"))
    return {bits: widths[i * experts : (i + 1) * experts] for i, bits in classes}


def channel_bits(bits: int, hidden: int, group: int) -> int:
    """Return what one channel takes, scales and zeros of 16 bits included; 0 bits take nothing."""
    if bits in (0, DENSE):
        return 3 * hidden * bits
    return 3 * (8 * -(-hidden * bits // 8) + 16 * -(-hidden // group) * (2 if bits > 1 else 1))


def _channel_bits(stored: Stored, width: int) -> Stored:
    names = cast(Mapping[tuple[int, str], int], stored)
    return {key: n * (8 if key[1].endswith(".codes") else width) for key, n in names.items()}


class PackedChannels(EncodedExperts):
    """Integers: `bits` of the classes, falling; `widths`, each expert's, class by class; `group`.

    Option `biases`: `gate+up` where there are some.
    """

    @staticmethod
    def touched(spec: BankSpec) -> frozenset[str]:
        biases = {_MIDDLE_BIAS} if "biases" in spec.options else set()
        return frozenset({"gate_up_proj", "down_proj"} | biases)

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        groups, hidden = -(-dims.hidden // spec.integer("group")), dims.hidden
        classes = channel_classes(spec)
        for bits, widths in classes.items():
            for name in dims.matrices:
                key, rows = f"{name}.b{bits}", sum(widths)
                if bits == DENSE:
                    shapes[f"{key}.dense"] = (rows, hidden)
                    continue
                shapes[f"{key}.codes"] = (rows, -(-hidden * bits // 8))
                shapes[f"{key}.scale"] = (rows, groups)
                if bits > 1:
                    shapes[f"{key}.zero"] = (rows, groups)
        if "biases" in spec.options:
            total = sum(map(sum, classes.values()))
            shapes |= dict.fromkeys(("gate_bias", "up_bias"), (total,))
        return shapes

    @classmethod
    def predicted_bits(cls, spec: BankSpec, layer: int, dims: Dims, width: int) -> Stored:
        return _channel_bits(cls.predicted(spec, layer, dims), width)

    @classmethod
    def used(cls, spec: BankSpec, dims: Dims, stored: Stored) -> tuple[float, float]:  # noqa: ARG003
        """Return the numbers that the channels of an expert stand for, in the mean."""
        kept = sum(map(sum, channel_classes(spec).values())) / spec.stored
        touched = sum(dims.numbers[name] for name in cls.touched(spec))
        return 0, dims.expert - touched * (1 - kept / dims.intermediate)

    def stored_bits(self, width: int) -> Stored:
        return _channel_bits(self.stored(), width)

    def matrix(self, name: str, expert: int) -> Tensor:
        rows = self._rows(name, expert)
        padded = F.pad(rows, (0, 0, 0, self.dims.intermediate - len(rows)))
        return padded.mT if name == "down" else padded

    def product(self, name: str, expert: int, x: Tensor, shared: Tensor | None) -> Tensor:
        def decode() -> Tensor:
            rows = self._rows(name, expert)
            return rows.mT if name == "down" else rows

        return decoded_product(x, decode)

    def middle_bias(self, expert: int) -> Tensor | None:
        if _MIDDLE_BIAS not in self.touched(self.spec):
            return None
        gate, up = self._biases(expert)
        return self.layout.join(gate, up)

    def expand(self) -> dict[str, Tensor]:
        dense = super().expand()
        if _MIDDLE_BIAS in self.touched(self.spec):
            each = (self._biases(e, self.dims.intermediate) for e in range(self.spec.stored))
            dense[_MIDDLE_BIAS] = torch.stack([self.layout.join(gate, up) for gate, up in each])
        return dense

    def prepared(self, experts: Sequence[int]) -> dict[tuple[str, int], Tensor]:
        """Decode the channels of some experts together: fewer and longer operations."""
        keys = [(name, e) for name in self.dims.matrices for e in experts]
        rows = [r for name in self.dims.matrices for r in self._decoded(name, experts)]
        return dict(zip(keys, rows, strict=True))

    def _rows(self, name: str, expert: int) -> Tensor:
        """Return the channels of an expert, class after class: (width, H)."""
        if (name, expert) in self.ready:
            return self.ready[name, expert]
        return self._decoded(name, [expert])[0]

    def _decoded(self, name: str, experts: Sequence[int]) -> list[Tensor]:
        """Return the channels of some experts, of each (width, H)."""
        classes = [
            self._class(name, bits, [slice(ends[e] - widths[e], ends[e]) for e in experts])
            for bits, widths in channel_classes(self.spec).items()
            for ends in [list(itertools.accumulate(widths))]
        ]
        return [torch.cat(parts) for parts in zip(*classes, strict=True)]

    def _class(self, name: str, bits: int, each: Sequence[slice]) -> Sequence[Tensor]:
        """Return the channels of a class that lie at some places: at each (width, H)."""
        key, first, last = f"{name}.b{bits}", each[0].start, each[-1].stop
        widths = [own.stop - own.start for own in each]

        def rows(part: str) -> Tensor:
            stored = self.solved(f"{key}.{part}")
            if last - first == sum(widths):  # neighbours are read where they lie
                return stored[first:last]
            return torch.cat([stored[own] for own in each])

        if bits == DENSE:
            return torch.split(rows("dense"), widths)
        scale = rows("scale")
        zero = rows("zero") if bits > 1 else torch.full_like(scale, 0.5)
        coded = Coded(unpack(rows("codes"), bits, self.dims.hidden), scale, zero)
        made = dequantised(coded, self.spec.integer("group")).to(scale.dtype)
        return torch.split(made, widths)

    def _biases(self, expert: int, width: int | None = None) -> list[Tensor]:
        """Return the biases (w,) of an expert's gate and up, filled with zeros to a width."""
        widths = [sum(each) for each in zip(*channel_classes(self.spec).values(), strict=True)]
        own = slice(sum(widths[:expert]), sum(widths[: expert + 1]))
        missing = 0 if width is None else width - widths[expert]
        return [F.pad(self.solved(name)[own], (0, missing)) for name in ("gate_bias", "up_bias")]
