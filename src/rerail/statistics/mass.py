"""Routing mass as the router gives it, before a model normalises or scales it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rerail.statistics.routed import SlotScalars
from rerail.statistics.statistic import Need, RoutedTokens


@dataclass(frozen=True)
class RouterMass(SlotScalars):
    """sum over X_e of p_e, p = softmax over all E router logits. float64 (E,)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})

    @property
    def name(self) -> str:
        """`router_mass`."""
        return "router_mass"

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Add up this batch."""
        assert tokens.logits is not None
        share = tokens.logits.float().softmax(dim=-1)
        return tokens.sum_by_expert(share.gather(1, tokens.index))
