"""Statistics that run every expert on every token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.moe.model import MoELayer
from rerail.statistics.statistic import DenseStatistic


@dataclass(frozen=True)
class OutputSum(DenseStatistic):
    """sum over all tokens of E_e(x), ungated. float64 (E, H)."""

    @property
    def name(self) -> str:
        """`output_sum`."""
        return "output_sum"

    def empty(self, layer: MoELayer) -> Tensor:
        """Return float64 zeros (E, H)."""
        return torch.zeros(layer.num_experts, layer.hidden_size, dtype=torch.float64)

    def measure(self, expert: int, hidden: Tensor, output: Tensor) -> Tensor:
        """Add up one expert's outputs: (H,)."""
        return output.sum(dim=0, dtype=torch.float64)


@dataclass(frozen=True)
class TokenCount(DenseStatistic):
    """Number of tokens that the dense pass saw. int64 (E,), the same in every entry."""

    @property
    def name(self) -> str:
        """`token_count`."""
        return "token_count"

    def empty(self, layer: MoELayer) -> Tensor:
        """Return int64 zeros (E,)."""
        return torch.zeros(layer.num_experts, dtype=torch.int64)

    def measure(self, expert: int, hidden: Tensor, output: Tensor) -> Tensor:
        """Return this batch's tokens."""
        return torch.tensor(len(hidden))
