"""Fits of A_i f(sum_j alpha_ij B_j) to a stack of matrices (MoBE, arXiv 2508.05257, section 3)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.compress.solvers.basis_loss import basis_loss
from rerail.compress.solvers.fitting import best_by_adam
from rerail.compress.solvers.ranks import check_reach, filled
from rerail.compress.solvers.whitening import Moments, effective_ranks
from rerail.errors import InputError
from rerail.experts.basis import ACTIVATIONS, mixed
from rerail.moe.model import MoELayer


class Fit(NamedTuple):
    """An activation f, and a schedule, see `best_by_adam`."""

    activation: str
    steps: int
    learning_rate: float
    patience: int


def fit_bases(stack: Tensor, bases: int, rank: int, fit: Fit) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (E, p, r), alpha (E, m), B (m, r, d) for a stack (E, p, d) in float32.

    The squared error is that of the stack over its standard deviation, which A takes afterwards.

    Args:
        stack: W.
        bases: m, a divisor of E.
        rank: r.
        fit: f and the schedule.
    """
    sigma = stack.std().clamp(min=torch.finfo(stack.dtype).tiny)
    target: Tensor = stack / sigma

    def loss(a: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return basis_loss(a, F.softmax(w, -1), b, target, fit.activation)

    a, w, b = best_by_adam(start(stack, bases, rank), loss, *fit[1:])
    return a * sigma, F.softmax(w, -1), b


def start(stack: Tensor, bases: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD start: A (E, p, r), w (E, m) one-hot, B (m, r, d)."""
    n, p, d = stack.shape
    u, s, vt = torch.linalg.svd(stack.reshape(bases, n // bases * p, d), full_matrices=False)
    sign = vt.gather(-1, vt.abs().argmax(-1, keepdim=True)).sign()
    a = (u * (s.unsqueeze(-1) * sign).mT)[..., :rank].reshape(n, p, rank)
    w = F.one_hot(torch.arange(n, device=stack.device) // (n // bases), bases).to(stack.dtype)
    return a.contiguous(), w, (vt * sign)[:, :rank].contiguous()


def fit_many(
    stacks: Tensor, bases: int, ranks: Sequence[int], fit: Fit
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return what `fit_bases` does for each of many stacks (G, k, p, d), fitted side by side.

    Ranks differ: A and B are filled up with zeros, which have no gradient as f(0) = 0. The best
    step is that of all together.
    """
    if len(stacks) == 1:
        return [fit_bases(stacks[0], bases, ranks[0], fit)]
    tiny = torch.finfo(stacks.dtype).tiny
    sigma = stacks.flatten(1).std(dim=1).clamp(min=tiny).view(-1, 1, 1, 1)
    target, most = stacks / sigma, max(ranks)
    firsts = [start(s, bases, r) for s, r in zip(stacks, ranks, strict=True)]
    a = torch.stack([F.pad(a, (0, most - a.shape[-1])) for a, _, _ in firsts])
    b = torch.stack([F.pad(b, (0, 0, 0, most - b.shape[-2])) for _, _, b in firsts])
    w = torch.stack([w for _, w, _ in firsts])
    bent = ACTIVATIONS[fit.activation]

    def loss(a: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mix = torch.einsum("gkm,gmrd->gkrd", F.softmax(w, -1), b)
        return (a @ bent(mix) - target).square().sum()

    a, w, b = best_by_adam((a, w, b), loss, *fit[1:])
    a, alpha = a * sigma, F.softmax(w, -1)
    return [(a[g, ..., :r], alpha[g], b[g, :, :r]) for g, r in enumerate(ranks)]


def by_use(count: Tensor, size: int) -> Tensor:
    """Return the group of each expert (E,): the `size` most used are group 0, ties in order.

    Raises:
        InputError: the size is less than 1.
    """
    if size < 1:
        raise InputError(f"compressor.group_size={size}; allowed: 1 or more")
    groups = torch.empty(len(count), dtype=torch.int64)
    groups[count.argsort(descending=True, stable=True)] = torch.arange(len(count)) // size
    return groups


def group_ranks(
    layer: MoELayer, max_numbers: int, fixed: int, groups: Tensor, bases: int, scores: Tensor | None
) -> dict[str, tuple[int, ...]]:
    """Return the ranks of each group by matrix, `gate` and `up`.

    Args:
        layer: whose experts are factorised.
        max_numbers: what may be stored.
        fixed: the numbers stored whatever the ranks.
        groups: of each expert (E,).
        bases: m of each group.
        scores: of the groups, of gate and then of up (2G,); None for equal ones.

    Raises:
        InputError: a group cannot be cut into `bases` equal parts.
        OutOfReach: nothing fits.
    """
    _, p, d, _ = layer.dims
    sizes = torch.bincount(groups).tolist()
    if bases < 1 or any(size % bases for size in sizes):
        raise InputError(
            f"compressor.bases={bases} must divide the number of experts in every group, and they "
            f"are {sizes} in layer {layer.index}; allowed: 1, or another compressor.group_size"
        )
    costs = [size * p + bases * d for size in sizes] * 2
    caps = [min(size // bases * p, d) for size in sizes] * 2
    most = fixed + sum(cost * cap for cost, cap in zip(costs, caps, strict=True))
    check_reach(layer, max_numbers, fixed + sum(costs), most, max(costs))
    even = torch.ones(len(costs)) if scores is None else scores
    ranks = filled(even, costs, caps, max_numbers - fixed)
    return {"gate": tuple(ranks[: len(sizes)]), "up": tuple(ranks[len(sizes) :])}


def group_scores(stack: Tensor, groups: Tensor, share: Tensor, xi: float) -> Tensor:
    """Return C_g = xi R_g / sum R + (1 - xi) F_g, float64 (G,).

    Args:
        stack: (E, out, in).
        groups: of each expert (E,).
        share: of each expert in all tokens (E,); F_g is their sum.
        xi: how much the effective rank R_g of a group's matrices, one below the other, counts.
    """
    count, plain = int(groups.max()) + 1, Moments(None, share, stack.shape[2])
    whole = [stack[(groups == g).to(stack.device)].flatten(0, 1) for g in range(count)]
    ranks = torch.cat([effective_ranks(matrix.unsqueeze(0), plain) for matrix in whole])
    used = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, share.double())
    return xi * ranks / ranks.sum() + (1 - xi) * used


def fit_groups(
    stack: Tensor, groups: Sequence[int], ranks: Sequence[int], bases: int, fit: Fit
) -> tuple[dict[str, Tensor], Tensor]:
    """Return A, B and (for more than one base) alpha as `grouped_basis` stores them, and W'.

    Args:
        stack: W (E, p, d) in float32.
        groups: of each expert.
        ranks: of each group.
        bases: of each group.
        fit: f and the schedule.
    """
    members = [[e for e, of in enumerate(groups) if of == g] for g in range(len(ranks))]
    own, rows = dict[int, Tensor](), dict[int, Tensor]()
    alphas, made = stack.new_empty(len(stack), bases), torch.empty_like(stack)
    for size in sorted(set(map(len, members))):
        same = [g for g, of in enumerate(members) if len(of) == size]
        wholes = torch.stack([stack[members[g]] for g in same])
        fits = fit_many(wholes, bases, [ranks[g] for g in same], fit)
        for g, (a, alpha, b) in zip(same, fits, strict=True):
            made[members[g]], alphas[members[g]] = mixed(a, alpha, b, fit.activation), alpha
            own |= dict(zip(members[g], a, strict=True))
            rows[g] = b.flatten(0, 1)
    parts = {
        "A": torch.cat([own[e] for e in range(len(stack))], dim=1),
        "B": torch.cat([rows[g] for g in sorted(rows)]),
    }
    return parts | ({"alpha": alphas} if bases > 1 else {}), made
