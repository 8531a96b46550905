"""The loss of mixtures of bases, with its gradient by hand.

Symbols: T (E, p, d) a stack of matrices, A (E, p, r), alpha (E, m), B (m, r, d), f an activation;
M_i = sum_j alpha_ij B_j, R_i = A_i f(M_i) - T_i, loss = sum_i ||R_i||^2. Then

    dA_i = 2 R_i f(M_i)^T,   dM_i = 2 A_i^T R_i * f'(M_i),
    dalpha_ij = <dM_i, B_j>,   dB_j = sum_i alpha_ij dM_i.

A few experts at a time, so that what stands between the products stays in the processor's cache:
autograd writes every such tensor to memory and reads it again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 20  # numbers of a stack that are worked on at once


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(x)
    y = x * gate
    return y, gate * (1 + x - y)


def _tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(x)
    return y, 1 - y * y


def _identity(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.ones_like(x)


# f and its slope at x
ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "silu": _silu,
    "tanh": _tanh,
    "identity": _identity,
}


class _BasisLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, a: Tensor, alpha: Tensor, b: Tensor, target: Tensor, activation: str
    ) -> Tensor:
        flat = b.flatten(1)
        d_a, d_alpha, d_b = torch.empty_like(a), torch.empty_like(alpha), torch.zeros_like(flat)
        loss = target.new_zeros(())
        step = max(1, PIECE // target[0].numel())
        for i in range(0, len(a), step):
            few = slice(i, i + step)
            mixed = (alpha[few] @ flat).view(-1, *b.shape[1:])
            y, slope = ACTIVATIONS[activation](mixed)
            rest = torch.baddbmm(target[few], a[few], y, beta=-1)
            loss += rest.square().sum()
            rest *= 2
            torch.bmm(rest, y.mT, out=d_a[few])
            d_mixed = (torch.bmm(a[few].mT, rest) * slope).flatten(1)
            torch.mm(d_mixed, flat.T, out=d_alpha[few])
            d_b.addmm_(alpha[few].T, d_mixed)
        ctx.save_for_backward(d_a, d_alpha, d_b.view_as(b))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return (*(grad * part for part in ctx.saved_tensors), None, None)


def basis_loss(a: Tensor, alpha: Tensor, b: Tensor, target: Tensor, activation: str) -> Tensor:
    """Return sum_i || A_i f(sum_j alpha_ij B_j) - T_i ||^2, a scalar with a gradient.

    Args:
        a: A (E, p, r).
        alpha: (E, m).
        b: B (m, r, d).
        target: T (E, p, d).
        activation: the name of f.
    """
    loss: Tensor = _BasisLoss.apply(a, alpha, b, target, activation)  # type: ignore[no-untyped-call]
    return loss
