"""Statistics of routed tokens: counts, moments and outputs that most pruning scores are made of.

X_e are the tokens that chose slot e, g the gate weight, f the expert's output before the gate and
n = ||f||_2.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerail.moe.model import MoELayer
from rerail.statistics.statistic import Need, RoutedStatistic, RoutedTokens


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

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Count this batch."""
        return torch.bincount(tokens.index.flatten(), minlength=tokens.num_experts)


class SlotScalars(RoutedStatistic):
    """One float64 a slot: (E,)."""

    def empty(self, layer: MoELayer) -> Tensor:
        """Return float64 zeros (E,)."""
        return torch.zeros(layer.num_experts, dtype=torch.float64)


@dataclass(frozen=True)
class Moment(SlotScalars):
    """sum over X_e of g^a n^p. float64 (E,)."""

    gate_power: int
    norm_power: int

    @property
    def name(self) -> str:
        """`moment_g<a>_n<p>`."""
        return f"moment_g{self.gate_power}_n{self.norm_power}"

    def needed(self) -> frozenset[Need]:
        """Outputs are needed where their norm enters."""
        return frozenset({"outputs"} if self.norm_power else ())

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Add up this batch."""
        value = tokens.gates.float() ** self.gate_power
        if self.norm_power:
            assert tokens.norms is not None
            value = value * tokens.norms.float() ** self.norm_power
        return tokens.sum_by_expert(value)


class SlotVectors(RoutedStatistic):
    """One float64 vector a slot, of the width of the outputs: (E, H)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"outputs"})

    def empty(self, layer: MoELayer) -> Tensor:
        """Return float64 zeros (E, H)."""
        return torch.zeros(layer.num_experts, layer.hidden_size, dtype=torch.float64)


@dataclass(frozen=True)
class OutputSumRouted(SlotVectors):
    """sum over X_e of f. float64 (E, H)."""

    @property
    def name(self) -> str:
        """`output_sum_routed`."""
        return "output_sum_routed"

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Add up this batch."""
        return tokens.sum_runs(lambda f: f, tokens.sorted_outputs)
