"""Distances between experts, all pairs at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rerail.moe.fused_experts import ExpertWeights

_CHUNK = 8192  # columns whose float64 copy exists at once


def between_weights(stacks: Sequence[ExpertWeights], eps: float = 1e-12) -> Tensor:
    """Return the mean over projections of 2 ||M_a - M_b||_F / (||M_a||_F + ||M_b||_F + 2 eps).

    Args:
        stacks: experts, layer by layer; N of them in all.
        eps: keeps experts that are zero finite.

    Returns:
        float64 (N, N), symmetric, 0 on the diagonal, in [0, 2].
    """
    count = sum(len(stack.gate) for stack in stacks)
    total = torch.zeros(count, count, dtype=torch.float64)
    for matrices in zip(*stacks, strict=True):
        device = matrices[0].device
        gram = _gram(torch.cat([m.detach().flatten(1).to(device) for m in matrices]))
        norm = gram.diagonal().clamp(min=0).sqrt()
        total += 2 * _apart(gram) / (norm.unsqueeze(0) + norm.unsqueeze(1) + 2 * eps)
    return (total / 3).clamp(max=2)


def between_rows(rows: Tensor) -> Tensor:
    """Return Euclidean distances of rows (N, D): float64 (N, N), symmetric, 0 on the diagonal."""
    return _apart(_gram(rows.detach()))


def _gram(rows: Tensor) -> Tensor:
    """Return the inner products of rows (N, D) in float64, on the CPU."""
    out = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, _CHUNK, dim=1):
        wide = part.double()
        out += wide @ wide.T
    return ((out + out.T) / 2).cpu()


def _apart(gram: Tensor) -> Tensor:
    """Return distances from inner products; what rounding alone would make is 0."""
    square = gram.diagonal().unsqueeze(0) + gram.diagonal().unsqueeze(1)
    rest = square - 2 * gram
    return rest.masked_fill(rest < 1e-13 * square, 0).sqrt().fill_diagonal_(0)
