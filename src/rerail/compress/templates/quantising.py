"""Quantisers: every expert is kept, as integer codes of few bits. Open: `encode`.

Bits are those of the codes; scales and zeros come on top, as the papers count, and the plan's notes
give the effective bits with them. The router stays as it is.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Decision, LayerWise, untouched
from rerail.errors import InputError, OutOfReach
from rerail.experts.base import BankSpec, Integer
from rerail.experts.quantized import DENSE, Coded, QuantizedExperts, buckets, pack
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation, Uniform
from rerail.plan.budget import Bits
from rerail.statistics.statistic import LayerStatistics, Statistic, StatisticSet

WIDTHS = (1, 2, 3, 4, 8, DENSE)
_AT_ONCE = 2**26  # numbers of matrices or moments that are encoded together


@dataclass(frozen=True, kw_only=True)
class Packing(LayerWise):
    """Stores every expert of a layer in bits of its own; a share is the sum of the experts' bits.

    Attributes:
        run: whether the bank keeps expanded experts in memory or expands them at every forward.
    """

    paradigm: ClassVar[str] = "quantisation"
    budget: ClassVar[type] = Bits

    run: Literal["materialised", "lazy"] = "materialised"

    @property
    @abstractmethod
    def coder(self) -> "Quantiser":
        """What turns matrices into codes."""

    @abstractmethod
    def bits_of(self, layer: MoELayer, statistics: LayerStatistics, share: int) -> tuple[int, ...]:
        """Return each expert's bits; their sum is at most `share`."""

    @abstractmethod
    def check_layer(self, layer: MoELayer, ratio: Bits) -> None:
        """Raise OutOfReach where a layer cannot have this average."""

    def check(self, layers: Sequence[MoELayer], ratio: Bits, allocation: Allocation) -> None:
        """Check the average for every layer."""
        if not isinstance(allocation, Uniform):
            raise OutOfReach(
                f"allocation {allocation} counts experts, and {type(self).__name__} keeps them "
                "all; use allocation=uniform"
            )
        for layer in layers:
            self.check_layer(layer, ratio)

    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Bits,
        allocation: Allocation,
    ) -> list[int]:
        """Return the bits that the experts of each layer share, rounded down."""
        return [int(layer.num_experts * ratio.average + 1e-9) for layer in layers]

    def decide(self, layer: MoELayer, statistics: LayerStatistics, share: int) -> Decision:
        """Choose bits, and encode the experts."""
        bits = self.bits_of(layer, statistics, share)
        integers: dict[str, Integer] = {"bits": bits, "group": self.coder.group}
        spec = BankSpec("quantized", len(bits), (), integers, {"run": self.run})
        solved = self.coder.encode_layer(layer, statistics, spec)
        size = f"{sum(bits) / len(bits):.4g} bits a number, {effective_bits(spec, layer):.6g}"
        said = (f"{size} with scales and zeros of 16", *self.coder.remarks(layer, statistics))
        notes = tuple(f"layer {layer.index}: {words}" for words in said)
        return Decision(untouched(layer, spec), solved, notes)


@dataclass(frozen=True, kw_only=True)
class Quantiser(Packing):
    """The same bits for every expert.

    Attributes:
        group: G, how many numbers along the input axis share a scale and a zero.
    """

    group: int = 128

    def __post_init__(self) -> None:
        """Check the group."""
        if self.group < 1:
            raise InputError(f"compressor.group={self.group} must be at least 1")

    @property
    def requires(self) -> tuple[Statistic, ...]:
        """No statistic."""
        return ()

    @abstractmethod
    def encode(self, stack: Tensor, moment: Tensor | None, bits: int) -> Coded:
        """Return codes, scales and zeros.

        Args:
            stack: (n, out, in) matrices; scales and zeros are rounded to their dtype.
            moment: (n, in, in) sums of x x^T over the inputs x of each, where `moments` gives any.
            bits: of the codes, below 16.
        """

    def moments(self, layer: MoELayer, statistics: LayerStatistics) -> Mapping[str, Tensor]:
        """Return second moments (E, in, in) for gate, up and down; none by default."""
        return {}

    def remarks(self, layer: MoELayer, statistics: LayerStatistics) -> tuple[str, ...]:
        """Return what the plan's notes should say about a layer; nothing by default."""
        return ()

    @property
    def coder(self) -> "Quantiser":
        """Itself."""
        return self

    def bits_of(self, layer: MoELayer, statistics: LayerStatistics, share: int) -> tuple[int, ...]:
        """Return the same bits for all."""
        return (share // layer.num_experts,) * layer.num_experts

    def check_layer(self, layer: MoELayer, ratio: Bits) -> None:
        """One width for all experts is an integer that can be packed."""
        if ratio.average not in WIDTHS:
            raise OutOfReach(
                f"{type(self).__name__} cannot reach an average of {ratio.average:g} bits: it "
                "gives every expert the same; allowed averages: 1, 2, 3, 4, 8 (16 changes nothing)"
            )

    def encode_layer(
        self, layer: MoELayer, statistics: LayerStatistics, spec: BankSpec
    ) -> dict[str, Tensor]:
        """Return the solved tensors of a packed bank."""
        moments, tensors = self.moments(layer, statistics), dict[str, Tensor]()
        for name, stack in layer.stack()._asdict().items():
            for bits, experts in buckets(spec).items():
                found = self._bucket(stack.detach(), moments.get(name), bits, experts)
                tensors |= {f"{name}.b{bits}.{part}": t for part, t in found.items()}
        return tensors

    def _bucket(
        self, stack: Tensor, moment: Tensor | None, bits: int, experts: Sequence[int]
    ) -> dict[str, Tensor]:
        if bits == DENSE:
            return {"dense": stack[torch.tensor(experts)].clone()}
        out, inner = stack.shape[1:]
        few = max(1, _AT_ONCE // (inner * (out if moment is None else max(out, inner))))
        done = []
        for some in torch.split(torch.tensor(experts), few):
            inputs = None if moment is None else moment[some].to(stack.device)
            codes, scale, zero = self.encode(stack[some], inputs, bits)
            done.append((pack(codes.flatten(-2), bits), scale, zero))
        codes, scale, zero = (torch.cat(parts) for parts in zip(*done, strict=True))
        return {"codes": codes, "scale": scale} | ({"zero": zero} if bits > 1 else {})


def effective_bits(spec: BankSpec, layer: MoELayer) -> float:
    """Return bits for each number of a matrix, scales and zeros (16 bits each) included."""
    counted = QuantizedExperts.predicted_bits(spec, layer.index, layer.dims, 16)
    solved = QuantizedExperts.shapes(spec, layer.dims)
    weights = 3 * layer.num_experts * layer.hidden_size * layer.intermediate_size
    return sum(counted[layer.index, name] for name in solved) / weights


def grid(piece: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scale and zero (..., out, 1) of one group (..., out, G) in float32.

    Between two and eight bits the grid runs from the least to the greatest number, widened to hold
    0, and its zero is an integer. One bit: scale = 2 mean |W| and zero = 1/2, so W ~ sign(W)
    mean |W|. The scale is rounded to `dtype`, in which it will be stored.
    """
    if bits == 1:
        scale = (2 * piece.abs().mean(dim=-1, keepdim=True)).to(dtype).float()
        return scale, torch.full_like(scale, 0.5)
    top = 2**bits - 1
    low = piece.amin(dim=-1, keepdim=True).clamp(max=0)
    scale = ((piece.amax(dim=-1, keepdim=True).clamp(min=0) - low) / top).to(dtype).float()
    return scale, (-low / positive(scale)).round().clamp(0, top)


def positive(scale: Tensor) -> Tensor:
    """Return the scale, or 1 where it is 0: for divisions."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def coded(piece: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the nearest codes of a group, as float32."""
    return (piece / positive(scale) + zero).round().clamp(0, 2**bits - 1)


def by_groups(stack: Tensor, group: int, fit: Callable[[Tensor], Coded]) -> Coded:
    """Fit each group (n, out, G) of a stack on its own; results have the stack's dtype."""
    parts = [fit(piece.float()) for piece in torch.split(stack, group, dim=-1)]
    codes, scale, zero = (torch.cat(t, dim=-1) for t in zip(*parts, strict=True))
    return Coded(codes.to(torch.uint8), scale.to(stack.dtype), zero.to(stack.dtype))


def round_to_nearest(stack: Tensor, bits: int, group: int) -> Coded:
    """Return the nearest codes on the grid of each group."""

    def fit(piece: Tensor) -> Coded:
        scale, zero = grid(piece, bits, stack.dtype)
        return Coded(coded(piece, scale, zero, bits), scale, zero)

    return by_groups(stack, group, fit)


def inverse_root(moment: Tensor, percdamp: float) -> tuple[Tensor, Tensor]:
    """Return float32 U (n, in, in), upper with U^T U = (H + damp I)^-1, and dead inputs (n, in).

    H is divided by its mean live diagonal first, so that `percdamp` is relative; a dead input has
    H_ii = 0 and gets 1. An H of zeros counts as the identity. Where H cannot be inverted its
    damping grows tenfold until it can.
    """
    h = moment.double().clone()
    diagonal = h.diagonal(dim1=1, dim2=2)
    dead = diagonal <= 0
    mean = diagonal.sum(dim=1) / (~dead).sum(dim=1).clamp(min=1)
    h /= torch.where(mean == 0, torch.ones_like(mean), mean).view(-1, 1, 1)
    diagonal.masked_fill_(dead, 1)
    eye, damp = (
        torch.eye(h.shape[1], dtype=h.dtype, device=h.device),
        torch.full_like(mean, percdamp),
    )
    for _ in range(20):
        damped = h + damp.view(-1, 1, 1) * eye
        lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not failed.any():
            break
        damp = torch.where(failed > 0, (10 * damp).clamp(min=1e-6), damp)
    root = torch.linalg.solve_triangular(lower.flip(1, 2), eye.expand_as(h), upper=True)
    return root.float(), dead & (mean > 0).unsqueeze(1)
