"""PuzzleMoE: two experts share one array of magnitudes (arXiv 2511.04805, section 3).

For a pair (i, j) of experts and each of their matrices, element by element,

    similar  = | |W_i| - |W_j| | <= tau (|W_i| + |W_j|)
    mask_e   = similar or |W_e| n_e is the larger of the two (a tie is the first's)
    M        = (|W_i| + |W_j|) / 2 where similar, else the larger one's magnitude
    W_e      ~ sign(W_e) mask_e M

with n_e (in,) the norm of each input over the tokens X_e of the expert: n^2 = sum x^2 for gate and
up, sum h^2 for down. bfloat16 of expert weights leaves three exponent bits free; signs and masks
fit into 16 bits with the magnitude, see `rerail.experts.puzzle`. The router keeps its E rows.

Ours, where the paper is silent: at P < E / 2 the 2 P paired experts are drawn (`pairs=least`: those
of the fewest tokens); n is a sum over tokens, so that a busier expert wins (`norm=mean`, or `none`
for |W| alone); an expert without tokens loses against one with some, two without compare |W|;
3-bit magnitudes (`store=codes`, the paper: "symmetric, no zero point") have no sign, so that all
codes count from 0 and scale = max / (2^b - 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.solvers.pairing import shared_magnitudes
from rerail.compress.templates.pairing import Pair, Pairing
from rerail.errors import InputError
from rerail.experts.puzzle import Shared
from rerail.statistics.routed import Count
from rerail.statistics.squares import InputSquares, MiddleSquares
from rerail.statistics.statistic import LayerStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class PuzzleMoE(Pairing):
    """Merges pairs where magnitudes are alike, and lets the more salient expert win elsewhere.

    Attributes:
        tau: how alike magnitudes are that are averaged, in [0, 1]; the paper's choice is 0.4.
        norm: how inputs count, see above.
    """

    tau: float = 0.4
    norm: Literal["sum", "mean", "none"] = "sum"

    paper: ClassVar[str] = "arXiv 2511.04805"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau <= 1:
            raise InputError(f"compressor.tau={self.tau} is outside [0, 1]")

    @property
    def measures(self) -> tuple[Statistic, ...]:
        squares = (InputSquares(), MiddleSquares()) if self.norm != "none" else ()
        return (*squares, Count()) if self.norm == "mean" else squares

    def merge(
        self, statistics: LayerStatistics, name: str, pair: Pair, matrices: Sequence[Tensor]
    ) -> Shared:
        norms = self.norms(statistics, name, pair)
        first, second = (n.to(matrices[0]) for n in norms)
        return shared_magnitudes(matrices[0], matrices[1], (first, second), self.tau)

    def norms(self, statistics: LayerStatistics, name: str, pair: Pair) -> Tensor:
        """Return n of two experts, (2, in); ones where neither has seen a token."""
        if self.norm == "none":
            return torch.ones(2, 1)
        squares = statistics[MiddleSquares() if name == "down" else InputSquares()][list(pair)]
        if self.norm == "mean":
            squares = squares / statistics[Count()][list(pair)].clamp(min=1).unsqueeze(1)
        return squares.sqrt() if squares.any() else torch.ones_like(squares)
