"""How alike the router finds experts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerail.moe.model import MoELayer
from rerail.statistics.moments import Grams
from rerail.statistics.statistic import Need, RoutedTokens


@dataclass(frozen=True)
class LogitGram(Grams):
    """sum over all tokens of z z^T, z (E,) the router logits. float64 (E, E).

    Slots that a mask silences count as 0.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})

    @property
    def name(self) -> str:
        """`logit_gram`."""
        return "logit_gram"

    def empty(self, layer: MoELayer) -> Tensor:
        """Return float64 zeros (E, E)."""
        return torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)

    def shape(self, tokens: RoutedTokens) -> tuple[int, ...]:
        """Return (E, E)."""
        return tokens.num_experts, tokens.num_experts

    def rows(self, tokens: RoutedTokens) -> Iterator[tuple[int, Tensor]]:
        """Yield the logits."""
        assert tokens.logits is not None
        logits = tokens.logits.float()
        yield 0, logits.masked_fill(torch.isneginf(logits), 0.0)
