"""Channels that others answer for: ridge leverages, and the refit of a down projection."""

import torch
from torch import Tensor

from rerail.compress.solvers.least_squares import damped_root, ridge_solution
from rerail.moe.fused_experts import ExpertWeights
from rerail.transfer import moved


def leverages(moment: Tensor, ridge: float) -> Tensor:
    """Return [C (C + l 1)^-1]_ii in [0, 1), float64 (I,), with l = ridge tr(C) / I.

    Args:
        moment: C, sums of h h^T (I, I), not all zero.
        ridge: above 0; l is more where float32 noise in C asks for it.
    """
    lower, level = damped_root(moment, ridge * float(moment.diagonal().mean()))
    inverse: Tensor = torch.cholesky_inverse(lower).diagonal()
    return 1 - level * inverse


def channel_sizes(experts: ExpertWeights) -> Tensor:
    """Return ||gate_j|| ||up_j|| ||down_j|| of stacked experts, float64 (E, I)."""
    gate, up, down = (w.detach().double() for w in experts)
    sizes: Tensor = gate.norm(dim=-1) * up.norm(dim=-1) * down.norm(dim=-2)
    return sizes


def refitted_down(down: Tensor, moments: Tensor, kept: Tensor, tokens: Tensor) -> Tensor:
    """Return argmin_D sum ||down h - D h_J||^2 of each expert, (E, H, I); zero beside J.

    The ridge is 1e-6 of the mean diagonal of C[J, J], and 1e-2 below 4 |J| tokens. It shrinks
    towards the kept columns as they are, which stay where there were no tokens.

    Args:
        down: (E, H, I).
        moments: C, (E, I, I) float64.
        kept: bool (E, I), J.
        tokens: (E,), how many C is the sum of.
    """
    refit = torch.zeros_like(down, dtype=torch.float64)
    few = (tokens < 4 * kept.sum(dim=1)).tolist()
    for e, j in enumerate(kept.to(down.device)):
        moment, own = moved(moments[e], down.device), down[e].double()
        ridge = 1e-2 if few[e] else 1e-6
        solved = ridge_solution(moment[j][:, j], own @ moment[:, j], own[:, j], ridge)
        refit[e, :, j] = solved
    return refit
