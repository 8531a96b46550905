"""How many channels get how many bits: the exact best of at most three classes under one limit."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rerail.errors import InputError, OutOfReach

Counts = dict[int, int]  # channels by bits, the most bits first


def check_classes(
    bits: Sequence[int], shares: Sequence[float] | None, allowed: Sequence[int]
) -> None:
    """Check candidate classes, and shares where they are given.

    Raises:
        InputError: bits are not falling or not allowed, or shares do not fit them.
    """
    falling = sorted(set(bits) & set(allowed), reverse=True)
    if not bits or list(bits) != falling:
        raise InputError(
            f"compressor.bits={list(bits)} must be falling and out of {sorted(allowed)}"
        )
    if shares is None:
        return
    if len(shares) != len(bits) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise InputError(
            f"compressor.shares={list(shares)} must be a share of each of {list(bits)}, with sum 1"
        )


def check_average(average: float, lowest: float, highest: float) -> None:
    """Check that classes reach average bits.

    Raises:
        OutOfReach: they do not.
    """
    if not lowest - 1e-9 <= average <= highest + 1e-9:
        raise OutOfReach(
            f"these classes cannot reach {average:g} bits on average, scales and zeros included; "
            f"allowed: {lowest:.4g} to {highest:.4g}, or other compressor.bits"
        )


def best_classes(energy: Tensor, costs: Mapping[int, int], max_bits: int) -> Counts:
    """Return the channels of each class, the strongest channels having the most bits.

    Minimises sum_j E_j 4^-b_j subject to sum_j cost(b_j) <= max_bits over all choices of up to
    three classes among the candidates, and all pairs of cuts in the order of energy. Of equal
    sums the first candidates win, widest first.

    Args:
        energy: (N,), in any order.
        costs: bits that one channel takes, by its class; they grow with it.
        max_bits: of all channels together.

    Raises:
        OutOfReach: not even the narrowest class fits.
    """
    falling = energy.double().flatten().sort(descending=True).values
    sums = torch.cat([falling.new_zeros(1), falling.cumsum(0)])
    classes = sorted(costs, reverse=True)
    some = itertools.combinations(classes, min(3, len(classes)))
    found = [made for chosen in some if (made := _best_cuts(sums, chosen, costs, max_bits))]
    if not found:
        raise OutOfReach(
            f"{max_bits} bits are too few for {len(falling)} channels; allowed: from "
            f"{len(falling) * min(costs.values())}"
        )
    return min(found, key=lambda made: made[0])[1]


def _best_cuts(
    sums: Tensor, classes: Sequence[int], costs: Mapping[int, int], max_bits: int
) -> tuple[float, Counts] | None:
    """Return the least objective of these classes and its counts; None where nothing fits.

    Args:
        sums: (N + 1,), energies of the first channels added up.
        classes: one to three, the most bits first.
        costs, max_bits: as above.
    """
    channels = len(sums) - 1
    wide, middle, narrow = (*classes, *([classes[-1]] * (3 - len(classes))))
    left = max_bits - channels * costs[narrow]
    if left < 0:
        return None
    # for every first cut the second comes as late as the bits allow: more bits are never worse
    first = torch.arange(channels + 1, dtype=torch.int64)
    rest = left - first * (costs[wide] - costs[narrow])
    first, rest = first[rest >= 0], rest[rest >= 0]
    step = costs[middle] - costs[narrow]
    second = channels - first if step == 0 else (rest // step).minimum(channels - first)
    cut = first + second
    weights = [4.0**-bits for bits in (wide, middle, narrow)]
    objective = weights[0] * sums[first] + weights[1] * (sums[cut] - sums[first])
    objective += weights[2] * (sums[-1] - sums[cut])
    best = int(objective.argmin())
    counts = Counts()
    numbers = (int(first[best]), int(second[best]), channels - int(cut[best]))
    for bits, number in zip((wide, middle, narrow), numbers, strict=True):
        counts[bits] = counts.get(bits, 0) + number
    return float(objective[best]), counts


def counts_by_shares(channels: int, classes: Sequence[int], shares: Sequence[float]) -> Counts:
    """Return the channels of each class where cuts lie at cumulative shares, rounded down."""
    cuts = [int(channels * total + 1e-9) for total in itertools.accumulate(shares)]
    cuts[-1] = channels
    return {b: cut - before for b, cut, before in zip(classes, cuts, [0, *cuts], strict=False)}


def bits_by_rank(energy: Tensor, counts: Counts) -> Tensor:
    """Return int64 bits, shaped as `energy`; ties give the lower position more of them."""
    order = torch.argsort(energy.flatten(), descending=True, stable=True)
    bits = torch.empty_like(order)
    bits[order] = torch.repeat_interleave(
        torch.tensor(list(counts)), torch.tensor(list(counts.values()))
    )
    return bits.view(energy.shape)
