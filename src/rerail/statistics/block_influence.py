"""How much a decoder layer turns the residual stream."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rerail.moe.model import MoELayer
from rerail.statistics.statistic import RoutedStatistic, RoutedTokens


@dataclass(frozen=True)
class BlockInfluence(RoutedStatistic):
    """sum of 1 - cos(stream in, stream out) over all tokens, and their number. float64 (2,)."""

    needs = frozenset({"stream"})

    def empty(self, layer: MoELayer) -> Tensor:
        """Return float64 (2,)."""
        return torch.zeros(2, dtype=torch.float64)

    def measure(self, tokens: RoutedTokens) -> Tensor:
        assert tokens.stream is not None
        into, out = (end.float() for end in tokens.stream)
        turned = 1 - cosine_similarity(into, out, dim=-1).double()
        return torch.stack([turned.sum(), turned.new_tensor(float(len(turned)))])

    @staticmethod
    def mean(tensor: Tensor) -> float:
        """Return the influence s in [0, 2] of a filled statistic; 0 without tokens."""
        return float(tensor[0] / tensor[1].clamp(min=1))
