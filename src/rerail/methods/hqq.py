"""HQQ-style half-quadratic quantisation (hqq 0.2.8, no paper). Needs no data.

For each row of W (out, in) and each group of G numbers along `in`, with b > 1 bits, the scale is
fixed, 1 / s = min((2^b - 1) / (max - min), 2e4), and the zero z (a number, not rounded) is refined
from -min / s, so that few errors are large. Repeat, at most `steps` times:

    Q = clamp(round(W / s + z), 0, 2^b - 1),    R = (Q - z) s,
    D = shrink(W - R),   shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta),
    z = mean(Q - (W - D) / s) over the group,   beta *= kappa.

The public code watches mean |W - R| of the whole matrix, stops when it no longer falls and keeps
the last z. Here each group keeps the z of its own least mean |W - R|, which is never worse than the
start. The scale is also kept above max |W| / 2^15, which bounds z where a group is nearly constant.
One bit is sign(W) * mean |W|: the iteration is of no use there. The shrinkage is made for weights
of about 0.02, where all but outliers shrink to 0 and z centres the errors of the group.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerail.compress.solvers.rounding import by_groups, coded, round_to_nearest
from rerail.compress.templates.quantiser import Quantiser
from rerail.experts.quantized import Coded


@dataclass(frozen=True, kw_only=True)
class HQQ(Quantiser):
    """Refines the zero of each group until few errors are large.

    Attributes:
        steps: at most this many updates of the zero.
        power: p; beta: first penalty; kappa: its growth.
    """

    group: int = 64
    steps: int = 20
    power: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01

    paper: ClassVar[str] = "baseline (hqq 0.2.8)"

    def encode(self, stack: Tensor, moment: Tensor | None, bits: int) -> Coded:
        if bits == 1:
            return round_to_nearest(stack, bits, self.group)
        return by_groups(stack, self.group, lambda piece: self.refined(piece, bits, stack.dtype))

    def refined(self, piece: Tensor, bits: int, dtype: torch.dtype) -> Coded:
        """Return the codes of one group (n, out, G), scale and zero rounded to `dtype`."""
        low, high = piece.amin(dim=-1, keepdim=True), piece.amax(dim=-1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp(min=1 / 2e4)
        bound = piece.abs().amax(dim=-1, keepdim=True) / 2**15
        scale = torch.maximum(scale, bound).to(dtype).float()
        zero, beta = -low / scale, self.beta
        best, least = zero, torch.full_like(zero, torch.inf)
        for _ in range(self.steps + 1):
            zero = zero.to(dtype).float()
            codes = coded(piece, scale, zero, bits)
            rest = piece - (codes - zero) * scale
            error = rest.abs().mean(dim=-1, keepdim=True)
            best = torch.where(error < least, zero, best)
            least = torch.minimum(error, least)
            zero = (codes - (piece - self.shrunk(rest, beta)) / scale).mean(dim=-1, keepdim=True)
            beta *= self.kappa
        return Coded(coded(piece, scale, best, bits), scale, best)

    def shrunk(self, rest: Tensor, beta: float) -> Tensor:
        """Return the proximal step of |x|^p."""
        size = rest.abs()
        if float(size.max()) <= beta ** (1 / (self.power - 2)):
            return torch.zeros_like(rest)  # what the formula gives below this size, but cheaper
        kept = size - size.clamp(min=1e-30) ** (self.power - 1) / beta
        return rest.sign() * kept.clamp(min=0)
