"""NAEE: not all experts are equal, pruning by layer reconstruction (arXiv 2402.14800).

Of all subsets C of r experts, keep the one whose layer answers most like the whole layer:

    C = argmin  sum_batches || Z - Z_C ||_F ,    Z, Z_C (rows of a batch, H)

with Z the routed output and Z_C the same with the other experts' logits at -inf (so gates are
renormalised, or not, as the model does it). Shared experts cancel. As in the code, the Frobenius
norm is not squared and is summed over batches, so the value depends on `batch`.

The code caches all 128 x 2,048 inputs of a layer, a batch being 8 sequences; here `rows` of them
are sampled, a batch being `batch` of these. Beyond `limit` subsets (Mixtral has 70), experts go one
at a time, each time the one whose loss costs least; that is not in the paper.

`NAEE` is the code's layer-wise search: all inputs are the original model's. `ProgressiveNAEE` takes
each layer's inputs from the model whose earlier layers are pruned already. As in the code, its Z
stays that of the original model on the same tokens (`target=original`); `target=own` asks instead
for what the unpruned layer answers on the new inputs.

What allocations compare is the error without each single expert, which the paper does not define.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.templates.reconstructing import (
    Errors,
    Free,
    Reconstructor,
    Sample,
    coarse_to_fine,
    exhaustive,
)
from rerail.errors import OutOfReach
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Ratio
from rerail.statistics.statistic import LayerStatistics, Statistic
from rerail.statistics.token_sample import OriginalTokenSample, TokenSample


@dataclass(frozen=True, kw_only=True)
class NAEE(Reconstructor):
    """The layer-wise search.

    Attributes:
        rows: how many tokens are sampled.
        batch: how many of them share one norm.
        limit: how many subsets are tried before the search goes greedy.
    """

    rows: int = 512
    batch: int = 128
    limit: int = 2000

    paper: ClassVar[str] = "arXiv 2402.14800"

    @property
    def measures(self) -> tuple[Statistic, ...]:
        """Sampled inputs of the experts."""
        return (TokenSample(self.rows),)

    def sample(self, layer: MoELayer, statistics: LayerStatistics) -> Sample:
        """Return the layer's answers on the sampled inputs."""
        return Sample(layer, TokenSample.hidden(statistics[TokenSample(self.rows)]))

    def measure(self, statistics: LayerStatistics, change: Tensor) -> Tensor:
        """Return the sum of the batches' norms."""
        squares = torch.linalg.vector_norm(change, dim=2).double().square()
        norms = [part.sum(dim=0).sqrt() for part in torch.split(squares, self.batch)]
        return torch.stack(norms).sum(dim=0)

    def search(self, layer: MoELayer, errors: Errors, count: int, free: Free) -> tuple[int, ...]:
        """Try all subsets, or drop one expert at a time."""
        experts = layer.num_experts
        if math.comb(experts, count) <= self.limit:
            return exhaustive(errors, experts, count, free)
        return coarse_to_fine(errors, experts, count, free, least=layer.top_k)


@dataclass(frozen=True, kw_only=True)
class ProgressiveNAEE(NAEE):
    """The search on a pruned prefix, layer by layer.

    Attributes:
        target: Z is the original model's answer, or the unpruned layer's own on the new inputs.
    """

    target: Literal["original", "own"] = "original"

    driver: ClassVar[Literal["one_shot", "sequential"]] = "sequential"

    @property
    def measures(self) -> tuple[Statistic, ...]:
        """Sampled inputs of the experts, and the same tokens' in the original model."""
        rows = TokenSample(self.rows)
        return (rows, OriginalTokenSample(self.rows)) if self.target == "original" else (rows,)

    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """Refuse what compares layers."""
        if self.guard != "none" or not allocation.fixed:
            raise OutOfReach(
                f"progressive NAEE cannot reach guard={self.guard} with {allocation}: it measures "
                "one layer at a time; allowed: guard=none with allocation=uniform or per_layer"
            )
        super().check(layers, ratio, allocation)

    def sample(self, layer: MoELayer, statistics: LayerStatistics) -> Sample:
        """Return the layer's answers on the prefix's inputs, with their offset from the target."""
        rows = TokenSample.hidden(statistics[TokenSample(self.rows)])
        if self.target == "own":
            return Sample(layer, rows)
        original = TokenSample.hidden(statistics[OriginalTokenSample(self.rows)])
        return Sample(layer, rows, layer.answer(original.to(layer.router_rows)))
