"""Windows: consecutive MoE layers that share what they may store."""

from collections.abc import Callable, Sequence

from rerail.errors import InputError, OutOfReach
from rerail.moe.model import MoELayer

# what layer i loses with each of these counts
Losses = Callable[[int, Sequence[int]], Sequence[float]]


def windows_of(layers: Sequence[MoELayer], width: int) -> list[list[int]]:
    """Return the positions of each window's layers; the last window may be narrower.

    Raises:
        InputError: the width is not positive.
        OutOfReach: a dense layer stands inside a window, or its layers' experts differ in size.
    """
    if width < 1:
        raise InputError(f"compressor.window={width} must be at least 1")
    every = list(range(len(layers)))
    windows = [every[i : i + width] for i in every[::width]]
    for window in windows:
        indices = [layers[i].index for i in window]
        reason = ""
        if dense := sorted({*range(indices[0], indices[-1])} - {*indices}):
            reason = f"layers {dense} between them are dense"
        if len({layers[i].expert_size for i in window}) > 1:
            reason = "their experts differ in size"
        if reason:
            raise OutOfReach(
                f"layers {indices} cannot share a window of {width}: {reason}; allowed: "
                "compressor.window=1"
            )
    return windows


def dealt(
    windows: Sequence[Sequence[int]],
    counts: Sequence[int],
    least: Sequence[int],
    most: Sequence[int],
    losses: Losses,
) -> list[int]:
    """Return counts whose sum in each window stays, and whose losses together are least.

    Ties go to the most even counts, then to more in earlier layers.

    Args:
        windows: positions of layers; a window of one stays as it is.
        counts, least, most: of each layer: now, and between what.
        losses: asked once a layer, for all counts that it may get.
    """
    out = list(counts)
    for window in (window for window in windows if len(window) > 1):
        total = sum(counts[i] for i in window)
        spare = total - sum(least[i] for i in window)
        # the best way to reach each sum so far; keys compare as tuples, and parts of them add
        best: dict[int, tuple[float, int, tuple[int, ...]]] = {0: (0.0, 0, ())}
        for i in window:
            ks = range(least[i], min(most[i], least[i] + spare) + 1)
            reached: dict[int, tuple[float, int, tuple[int, ...]]] = {}
            for k, loss in zip(ks, losses(i, ks), strict=True):
                for so_far, (lost, squares, fewer) in best.items():
                    key = (lost + loss, squares + k * k, (*fewer, -k))
                    if so_far + k not in reached or key < reached[so_far + k]:
                        reached[so_far + k] = key
            best = reached
        for i, negative in zip(window, best[total][2], strict=True):
            out[i] = -negative
    return out
