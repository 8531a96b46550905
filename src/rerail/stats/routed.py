"""Statistics of routed tokens: counts and the moments that most pruning scores are made of."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerail.moe.layer import MoELayer
from rerail.stats.statistic import RoutedStatistic, RoutedTokens


@dataclass(frozen=True)
class Count(RoutedStatistic):
    """c_e = |X_e|: how many tokens chose each slot. int64 (E,)."""

    @property
    def name(self) -> str:
        """`count`."""
        return "count"

    def empty(self, layer: MoELayer) -> Tensor:
        """Return int64 zeros (E,)."""
        return torch.zeros(layer.num_experts, dtype=torch.int64)

    def of(self, tokens: RoutedTokens) -> Tensor:
        """Count this batch."""
        return torch.bincount(tokens.index.flatten(), minlength=tokens.num_experts)


@dataclass(frozen=True)
class Moment(RoutedStatistic):
    """sum over X_e of g_e^a n_e^p, with gate weight g and output norm n. float64 (E,)."""

    gate_power: int
    norm_power: int

    needs_outputs: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """`moment_g<a>_n<p>`."""
        return f"moment_g{self.gate_power}_n{self.norm_power}"

    def empty(self, layer: MoELayer) -> Tensor:
        """Return float64 zeros (E,)."""
        return torch.zeros(layer.num_experts, dtype=torch.float64)

    def of(self, tokens: RoutedTokens) -> Tensor:
        """Add up this batch."""
        assert tokens.norms is not None
        value = tokens.gates.float() ** self.gate_power * tokens.norms.float() ** self.norm_power
        return tokens.sum_by_expert(value)
