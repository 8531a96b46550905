"""How small the gate weights of lower ranks are: what skipping thresholds are fitted on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.experts.skip_policy import BINS, tails
from rerail.moe.model import MoELayer
from rerail.statistics.statistic import RoutedStatistic, RoutedTokens


@dataclass(frozen=True)
class GateTails(RoutedStatistic):
    """Histogram over all tokens of the tails of ranks 2 to K. int64 (BINS,).

    The tail of rank i is (w_i + ... + w_K) / (w_1 + ... + w_K), w the gate weights in falling
    order; with K = 2 it is r / (1 + r) for the ratio r = w_2 / w_1. Bin b counts tails in
    [b, b + 1) / BINS, BINS a power of two, so that what lies below a threshold is exact.
    """

    @property
    def name(self) -> str:
        """`gate_tails`."""
        return "gate_tails"

    def empty(self, layer: MoELayer) -> Tensor:
        """Return int64 zeros (BINS,)."""
        return torch.zeros(BINS, dtype=torch.int64)

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Count this batch."""
        found = tails(tokens.gates).flatten()
        lower = found[torch.isfinite(found)]
        place = (lower * BINS).floor().long().clamp(max=BINS - 1)
        return torch.bincount(place, minlength=BINS)
