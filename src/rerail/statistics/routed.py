"""Statistics of routed tokens: counts, moments and outputs that most pruning scores are made of.

X_e are the tokens that chose slot e, g the gate weight, f the expert's output before the gate and
n = ||f||_2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.statistics.statistic import Need, RoutedStatistic, RoutedTokens


@dataclass(frozen=True)
class Count(RoutedStatistic):
    """c_e = |X_e|: how many tokens chose each slot. int64 (E,)."""

    axes = "E"
    dtype = torch.int64

    def measure(self, tokens: RoutedTokens) -> Tensor:
        return tokens.count_by_expert()


@dataclass(frozen=True)
class Moment(RoutedStatistic):
    """sum over X_e of g^a n^p. float64 (E,)."""

    axes = "E"

    gate_power: int
    norm_power: int

    @property
    def name(self) -> str:
        return f"moment_g{self.gate_power}_n{self.norm_power}"

    def needed(self) -> frozenset[Need]:
        """Outputs are needed where their norm enters."""
        return frozenset({"norms"} if self.norm_power else ())

    def measure(self, tokens: RoutedTokens) -> Tensor:
        value = tokens.gates.float() ** self.gate_power
        if self.norm_power:
            assert tokens.norms is not None
            value = value * tokens.norms.float() ** self.norm_power
        return tokens.sum_by_expert(value)


@dataclass(frozen=True)
class OutputSumRouted(RoutedStatistic):
    """sum over X_e of f. float64 (E, H)."""

    axes = "E H"
    needs = frozenset({"outputs"})

    def measure(self, tokens: RoutedTokens) -> Tensor:
        return tokens.sum_runs(lambda f: f, tokens.sorted_outputs)


@dataclass(frozen=True)
class GatedOutput(RoutedStatistic):
    """sum over X_e of g^a f. float64 (E, H)."""

    axes = "E H"
    needs = frozenset({"outputs"})

    gate_power: int

    @property
    def name(self) -> str:
        return f"gated_output_g{self.gate_power}"

    def measure(self, tokens: RoutedTokens) -> Tensor:
        weights = tokens.sorted_gates**self.gate_power
        return tokens.sum_runs(lambda f, g: g * f, tokens.sorted_outputs, weights)
