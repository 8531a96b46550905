"""Means and recoveries with standard errors clustered by block.

Tokens of one block are correlated, blocks are not: the block is the unit that is drawn. Every
function takes one float64 sum a block and the number of valid tokens of that block; blocks without
a valid token are left out. Paired functions need the same blocks in the same order.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Sums = NDArray[np.float64]


class Recovery(NamedTuple):
    """Recovered share of the lost quality and its standard error; both None when undefined."""

    value: float | None
    se: float | None


def _blocks(tokens: ArrayLike, *sums: ArrayLike) -> list[Sums]:
    """Return tokens and sums of the non-empty blocks as float64, checked."""
    arrays = [np.asarray(array, dtype=np.float64) for array in (tokens, *sums)]
    if any(array.ndim != 1 or array.shape != arrays[0].shape for array in arrays):
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise ValueError(f"tokens and block sums must be 1-D and equally long, not {shapes}")
    filled = arrays[0] > 0
    if not filled.any() or (arrays[0] < 0).any():
        raise ValueError("token counts must not be negative, and at least one must be positive")
    arrays = [array[filled] for array in arrays]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("a block sum is not finite: the model's output holds NaN or infinity")
    return arrays


def mean_and_se(values: ArrayLike, tokens: ArrayLike) -> tuple[float, float | None]:
    r"""Return the mean a token and its standard error, clustered by block.

    With block sums S_b, token counts n_b, N = sum n_b and B non-empty blocks, it is the ratio

        m = sum_b S_b / N,      se^2 = B / (B - 1) * sum_b (S_b - m n_b)^2 / N^2.

    Args:
        values: (B,) sum over the block's valid tokens, any unit.
        tokens: (B,) number of valid tokens.

    Returns:
        The mean, and its standard error or None with fewer than two blocks.

    Raises:
        ValueError: shapes differ, no token is valid, or a sum is not finite.
    """
    counts, sums = _blocks(tokens, values)
    total, blocks = counts.sum(), len(counts)
    mean = sums.sum() / total
    if blocks < 2:
        return float(mean), None
    squares = np.square(sums - mean * counts).sum()
    return float(mean), float(math.sqrt(blocks / (blocks - 1) * squares) / total)


def paired_difference(a: ArrayLike, b: ArrayLike, tokens: ArrayLike) -> tuple[float, float | None]:
    """Return the mean of a - b a token and its standard error, paired by block.

    It is `mean_and_se` of the differences a_b - b_b: what both models find hard cancels, so this is
    far tighter than two separate errors. Arguments, shapes and errors as there.
    """
    counts, first, second = _blocks(tokens, a, b)
    return mean_and_se(first - second, counts)


def recovery_of(
    nll_t: ArrayLike, nll_c: ArrayLike, nll_r: ArrayLike, tokens: ArrayLike
) -> Recovery:
    r"""Return the recovery of a repair and its jackknife standard error.

    With token means T, C, R of teacher, compressed and repaired model over the same blocks

        recovery = (C - R) / (C - T) = sum_b (c_b - r_b) / sum_b (c_b - t_b),

    and with theta_b the same without block b and theta their mean

        se^2 = (B - 1) / B * sum_b (theta_b - theta)^2.

    Both are None when the gap C - T is not positive or under two of its paired standard errors:
    nothing was measurably lost, so nothing can be recovered.

    Args:
        nll_t: (B,) negative log-likelihood of the teacher, nats summed over the block's tokens.
        nll_c: (B,) the same for the compressed model.
        nll_r: (B,) the same for the repaired model.
        tokens: (B,) number of valid tokens.

    Raises:
        ValueError: shapes differ, no token is valid, or a sum is not finite.
    """
    counts, teacher, compressed, repaired = _blocks(tokens, nll_t, nll_c, nll_r)
    gap, gap_se = paired_difference(compressed, teacher, counts)
    if gap_se is None or gap <= 0 or gap < 2 * gap_se:
        return Recovery(None, None)
    gained, lost = compressed - repaired, compressed - teacher
    value = float(gained.sum() / lost.sum())
    rest = lost.sum() - lost  # the gap without each block in turn
    if not rest.all():  # the whole gap lies in one block
        return Recovery(value, None)
    without = (gained.sum() - gained) / rest
    blocks = len(counts)
    squares = np.square(without - without.mean()).sum()
    return Recovery(value, float(math.sqrt((blocks - 1) / blocks * squares)))
