"""Fits by gradient descent that keep their best step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def best_by_adam(
    free: Sequence[Tensor],
    loss: Callable[..., Tensor],
    steps: int,
    learning_rate: float,
    patience: int,
) -> list[Tensor]:
    """Return the values of the free tensors with the least loss seen, looked at 40 times.

    Args:
        free: where to start; left as they are.
        loss: a scalar of the free tensors.
        steps: of Adam, with a constant learning rate.
        learning_rate: of Adam.
        patience: how many looks may pass without 0.1 % less loss before it stops.
    """
    values = [t.detach().clone().requires_grad_() for t in free]
    adam = torch.optim.Adam(values, lr=learning_rate, foreach=True)
    least, best = float("inf"), [t.detach().clone() for t in values]
    stale, every = 0, max(1, steps // 40)
    for step in range(steps + 1):
        with torch.enable_grad():
            now = loss(*values)
        if step % every == 0 or step == steps:
            seen = float(now.detach())
            stale = 0 if seen < 0.999 * least else stale + 1
            if seen < least:
                least, best = seen, [t.detach().clone() for t in values]
            if stale >= patience:
                break
        adam.zero_grad()
        now.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return best
