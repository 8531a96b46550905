"""Pairs of experts that share magnitudes (arXiv 2511.04805): masks, and who is paired with whom."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rerail.experts.puzzle import Shared


def shared_magnitudes(
    first: Tensor, second: Tensor, norms: tuple[Tensor, Tensor], tau: float
) -> Shared:
    """Return the shared magnitude (out, in) of two matrices, and their signs and masks (2, ...).

    Magnitudes that differ by at most tau (|W_i| + |W_j|) are averaged, and both keep theirs;
    elsewhere the one of the larger |W| n stays, a tie being the first's. A zero has no mask.

    Args:
        first, second: W_i and W_j (out, in), in float32 or wider.
        norms: n_i and n_j (in,); all equal where nothing is known of either.
        tau: in [0, 1].
    """
    x, y = first.abs(), second.abs()
    similar = (x - y).abs() <= tau * (x + y)
    ahead = x * norms[0] >= y * norms[1]
    magnitude = torch.where(similar, (x + y) / 2, torch.where(ahead, x, y))
    masks = torch.stack([similar | ahead, similar | ~ahead]) & (magnitude > 0)
    return Shared(magnitude, torch.stack([first.signbit(), second.signbit()]), masks)


def stacked(shared: Sequence[Shared], like: Tensor) -> Shared:
    """Return pairs (out, in) as one stack, also of none; `like` (out, in) says the shape."""
    if not shared:
        none = like.new_zeros(0, *like.shape)
        return Shared(none, *(none.bool().expand(2, *none.shape) for _ in range(2)))
    magnitudes, signs, masks = zip(*shared, strict=True)
    return Shared(torch.stack(magnitudes), torch.stack(signs, dim=1), torch.stack(masks, dim=1))


def annealed_pairs(
    pairs: Sequence[int],
    error: Callable[[int, int], float],
    generator: torch.Generator,
    steps: int,
) -> list[int]:
    """Return pairs, flat, of less summed error: simulated annealing over exchanges of partners.

    The temperature falls linearly from a tenth of the mean error of a pair to zero. The best
    pairing on the way is returned.

    Args:
        pairs: where to start, pair after pair.
        error: of a pair, whose order matters to ties only; each is asked for once.
        generator: of the draws.
        steps: exchanges that are tried.
    """
    known: dict[frozenset[int], float] = {}

    def cost(a: int, b: int) -> float:
        key = frozenset((a, b))
        if key not in known:
            known[key] = error(a, b)
        return known[key]

    now = list(pairs)
    total = sum(cost(*now[i : i + 2]) for i in range(0, len(now), 2))
    best, least, warmth = list(now), total, 0.2 * total / max(1, len(now))
    for step in range(steps if len(now) > 2 else 0):
        p, q = (2 * int(i) for i in torch.randperm(len(now) // 2, generator=generator)[:2])
        draws = torch.rand(2, generator=generator).tolist()
        r = q + (draws[0] < 0.5)
        other = q + q + 1 - r
        change = cost(now[p], now[r]) + cost(now[p + 1], now[other])
        change -= cost(now[p], now[p + 1]) + cost(now[q], now[q + 1])
        heat = warmth * (1 - step / steps)
        if change < 0 or (heat > 0 and draws[1] < math.exp(-change / heat)):
            now[p + 1], now[r] = now[r], now[p + 1]
            total += change
        if total < least:
            best, least = list(now), total
    return best
