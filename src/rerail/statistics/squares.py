"""Squares of what goes into an expert (x) and of its middle activation (h), channel by channel.

X_e are the tokens that chose slot e, g the gate weight and h = act(gate) * up (I,).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.statistics.statistic import RoutedStatistic, RoutedTokens


@dataclass(frozen=True)
class InputSquares(RoutedStatistic):
    """sum over X_e of x^2 (Wanda's squared norms). float64 (E, H)."""

    axes = "E H"

    def measure(self, tokens: RoutedTokens) -> Tensor:
        hidden = tokens.hidden
        out = hidden.new_zeros(tokens.num_experts, hidden.shape[1], dtype=torch.float64)
        for e, chosen, _ in tokens.by_expert():
            out[e] = hidden[chosen].float().square().sum(dim=0, dtype=torch.float64)
        return out


@dataclass(frozen=True)
class MiddleSquares(RoutedStatistic):
    """sum over X_e of h^2, before the gate. float64 (E, I)."""

    axes = "E I"
    needs = frozenset({"middle"})

    def measure(self, tokens: RoutedTokens) -> Tensor:
        return tokens.sum_runs(torch.square, tokens.sorted_middle)


@dataclass(frozen=True)
class MiddleEnergy(RoutedStatistic):
    """sum over X_e of (g h)^2 (CAMERA's phi_2, squared). float64 (E, I)."""

    axes = "E I"
    needs = frozenset({"middle"})

    def measure(self, tokens: RoutedTokens) -> Tensor:
        return tokens.sum_runs(
            lambda h, g: (g * h).square(), tokens.sorted_middle, tokens.sorted_gates
        )


@dataclass(frozen=True)
class MiddlePeak(RoutedStatistic):
    """max over X_e of |g h| (CAMERA's phi_inf). float64 (E, I)."""

    axes = "E I"
    needs = frozenset({"middle"})
    merges_by = "max"

    def measure(self, tokens: RoutedTokens) -> Tensor:
        middle = tokens.sorted_middle
        out = middle.new_zeros(tokens.num_experts, middle.shape[-1], dtype=torch.float64)
        for e, (h, g) in tokens.runs(middle, tokens.sorted_gates):
            out[e] = (g * h).abs().amax(dim=0)
        return out
