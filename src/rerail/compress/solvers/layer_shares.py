"""Shares of layers from how much each of them turns the residual stream."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rerail.errors import OutOfReach
from rerail.plan.allocation import Allocation
from rerail.statistics.block_influence import BlockInfluence
from rerail.statistics.statistic import LayerStatistics


def influence_shares(
    views: Sequence[LayerStatistics | None],
    removed: float,
    allocation: Allocation,
    epsilon: float,
    cap: float,
) -> list[float]:
    """Return the share that each layer loses by its BlockInfluence; equal before any is known.

    Raises:
        OutOfReach: more than `cap` would go, or the allocation has shares of its own.
    """
    if not allocation.uniform or removed > cap:
        raise OutOfReach(
            f"shares by block influence cannot reach {removed:.4g} with {allocation}: no layer "
            f"loses more than cap={cap}; allowed ratios: 0 to {cap} with allocation=uniform"
        )
    found = [0.0 if view is None else BlockInfluence.mean(view[BlockInfluence()]) for view in views]
    return softmax_shares(torch.tensor(found), removed, epsilon, cap)


def softmax_shares(influence: Tensor, removed: float, epsilon: float, cap: float) -> list[float]:
    """Return phi (L,), phi = L removed softmax(-influence / epsilon), none above the cap.

    It maximises sum_l s_l (1 - phi_l) + epsilon H(phi) under its mean (arXiv 2408.09632, section
    3.3). What the cap cuts off goes to the other layers in proportion, until none is above it.

    Args:
        influence: s, (L,).
        removed: the mean of phi, at most `cap`.
        epsilon: how even shares are; infinite is uniform.
        cap: the highest share of a layer.
    """
    shares, free = torch.full_like(influence.double(), cap), torch.ones_like(influence).bool()
    while free.any():
        rest = removed * len(shares) - cap * int((~free).sum())
        # a softmax of the free layers alone: their proportions also where all were tiny
        shares[free] = rest * torch.softmax(-influence.double()[free] / epsilon, dim=0)
        over = free & (shares > cap)
        shares[over] = cap
        if not over.any():
            break
        free &= ~over
    return [float(share) for share in shares.clamp(0, cap)]
