"""Means of a layer's experts, weighted by use and entry by entry."""

import torch
from torch import Tensor

from rerail.moe.fused_experts import ExpertWeights
from rerail.moe.model import MoELayer


def used(count: Tensor) -> Tensor:
    """Return each expert's share of tokens, float64 (E,); equal where there are none."""
    weights = count.double() if count.sum() else torch.ones(len(count), dtype=torch.float64)
    return weights / weights.sum()


def by_matrix(layer: MoELayer, flat: Tensor) -> ExpertWeights:
    """Return what belongs to each weight, given for `gate_up_proj`, then `down_proj` (E, N)."""
    n, p, d, _ = layer.dims
    parts = flat[:, : 2 * p * d], flat[:, 2 * p * d :]
    shapes = ((n, d, 2 * p), (n, p, d)) if layer.layout.transposed else ((n, 2 * p, d), (n, d, p))
    return layer.layout.unpack(*(t.reshape(s) for t, s in zip(parts, shapes, strict=True)))


def narrowed(weights: ExpertWeights, kept: list[int]) -> ExpertWeights:
    """Return the experts with some of their channels only."""
    gate, up, down = weights
    return ExpertWeights(gate[:, kept], up[:, kept], down[:, :, kept])


def blended(stack: Tensor, share: Tensor, precision: Tensor | None) -> Tensor:
    """Return sum_i f_i F_i * W_i / sum_i f_i F_i, the plain mean where all weights are zero.

    Args:
        stack: W (E, out, in).
        share: f (E,).
        precision: F (E, out, in), or None for ones.

    Returns:
        (out, in) in the experts' dtype.
    """
    total, mass = torch.zeros((2, *stack.shape[1:]), dtype=torch.float64, device=stack.device)
    for i, weight in enumerate(stack):
        f = share[i].to(mass) if precision is None else share[i].to(mass) * precision[i].to(mass)
        mass += f
        total += f * weight
    mean = stack.mean(dim=0, dtype=torch.float64)
    return torch.where(mass > 0, total / mass.where(mass > 0, 1.0), mean).to(stack.dtype)
