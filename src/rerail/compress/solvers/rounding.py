"""Grids of few bits, rounding to them, and the root that moves rounding errors on."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rerail.experts.quantized import DENSE, Coded, dequantised


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


def round_to_nearest(
    stack: Tensor, bits: int, group: int, dtype: torch.dtype | None = None
) -> Coded:
    """Return the nearest codes on the grid of each group, whose scales have this dtype."""
    dtype = dtype or stack.dtype

    def fit(piece: Tensor) -> Coded:
        scale, zero = grid(piece, bits, dtype)
        return Coded(coded(piece, scale, zero, bits), scale, zero)

    codes, scale, zero = by_groups(stack, group, fit)
    return Coded(codes, scale.to(dtype), zero.to(dtype))


def round_in_turn(
    columns: Tensor, root: Tensor, bits: Sequence[int], group: int, dtype: torch.dtype
) -> dict[int, Coded]:
    """Return codes (w, out) by bits; each column's error moves on to those still to come (GPTQ).

    Args:
        columns: (out, in) float32; those of 16 bits make no error and get no codes.
        root: U (in, in) of their inputs, as from `inverse_root`.
        bits: of each column.
        group: how many numbers along `out` share a scale.
        dtype: of scales and zeros.
    """
    w, block = columns.mT.clone(memory_format=torch.contiguous_format), 128
    made: dict[int, list[Coded]] = {b: [] for b in bits if b != DENSE}
    for start in range(0, len(w), block):
        end = min(start + block, len(w))
        errors = torch.zeros_like(w[start:end])
        for i in range(start, end):
            if bits[i] == DENSE:
                continue
            nearest = round_to_nearest(w[i : i + 1], bits[i], group, dtype)
            made[bits[i]].append(nearest)
            errors[i - start] = error = (w[i] - dequantised(nearest, group)[0]) / root[i, i]
            w[i + 1 : end] -= torch.outer(root[i, i + 1 : end], error)
        w[end:] -= root[start:end, end:].mT @ errors
    return {b: Coded(*map(torch.cat, zip(*each, strict=True))) for b, each in made.items()}


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
