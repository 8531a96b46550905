"""The joint column space of a group's experts, and averages seen in it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rerail.compress.solvers.whitening import Moments


def joint_columns(
    stack: Tensor, labels: Tensor, moments: Moments
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each group sigma^2 (out,), falling, and U (out, out) of [W_1 S_1 | W_2 S_2 | ...].

    They are the eigenvalues and eigenvectors of sum_e W_e C_e W_e^T with C_e = S_e S_e^T.

    Args:
        stack: W (E, out, in).
        labels: (E,), the group of each expert.
        moments: C, of what the matrices are applied to.
    """
    for c in range(int(labels.max()) + 1):
        total = stack.new_zeros(stack.shape[1], stack.shape[1], dtype=torch.float64)
        for e in torch.nonzero(labels == c).flatten().tolist():
            total += stack[e].double() @ moments.of(e, stack.device) @ stack[e].double().mT
        values, u = torch.linalg.eigh(total)
        yield values.flip(0).clamp(min=0), u.flip(1)


def rank_of_energy(values: Tensor, energy: float) -> int:
    """Return the least r for which the r largest of sigma^2 (falling) are this share of all."""
    total = values.cumsum(dim=0)
    return 1 + int((total < energy * total[-1]).sum())


def project_(means: Tensor, stack: Tensor, labels: Tensor, rank: int | None, energy: float) -> None:
    """Replace each group's average W (M, out, in) by U_r U_r^T W, in place.

    It is what the group's joint SVD makes of the averages of its V_e.

    Args:
        means: of the groups.
        stack: (E, out, in), all experts.
        labels: (E,).
        rank: r of every group; None for the least one of this `energy`.
        energy: as in `rank_of_energy`.
    """
    plain = Moments(None, labels, stack.shape[2])
    for mean, (values, u) in zip(means, joint_columns(stack, labels, plain), strict=True):
        columns = u[:, : rank or rank_of_energy(values, energy)]
        mean.copy_(columns @ (columns.mT @ mean.double()))


def joint_low_rank(
    means: Tensor, stack: Tensor, labels: Tensor, moments: Moments, ranks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return U_r and U_r^T W of each group's average W (M, out, in), side by side along the ranks.

    The columns of W itself take the place of U_r where there are as many ranks as it can have.

    Returns:
        U (out, R) and V (R, in), R the sum of ranks, in the averages' dtype.
    """
    columns, rows = [], []
    groups = zip(means, joint_columns(stack, labels, moments), ranks, strict=True)
    for mean, (_, u), rank in groups:
        basis = u[:, :rank] if rank < min(mean.shape) else torch.linalg.qr(mean.double()).Q
        columns.append(basis)
        rows.append(basis.mT @ mean.double())
    return torch.cat(columns, dim=1).to(means.dtype), torch.cat(rows).to(means.dtype)
