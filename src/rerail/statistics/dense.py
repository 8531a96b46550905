"""Statistics that run every expert on every token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.statistics.statistic import DenseStatistic


@dataclass(frozen=True)
class OutputSum(DenseStatistic):
    """sum over all tokens of E_e(x), ungated. float64 (E, H)."""

    axes = "E H"

    def measure(self, expert: int, hidden: Tensor, output: Tensor) -> Tensor:
        return output.sum(dim=0, dtype=torch.float64)


@dataclass(frozen=True)
class TokenCount(DenseStatistic):
    """Number of tokens that the dense pass saw. int64 (E,), the same in every entry."""

    axes = "E"
    dtype = torch.int64

    def measure(self, expert: int, hidden: Tensor, output: Tensor) -> Tensor:
        return torch.tensor(len(hidden))
