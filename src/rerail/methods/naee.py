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
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Layers, Statistics
from rerail.compress.guard import Slots
from rerail.compress.solvers import reconstruction
from rerail.compress.templates.pruner import Pruner
from rerail.errors import OutOfReach
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Budget
from rerail.statistics.statistic import LayerStatistics, Statistic
from rerail.statistics.token_sample import OriginalTokenSample, TokenSample


@dataclass(frozen=True, kw_only=True)
class NAEE(Pruner):
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
        return (TokenSample(self.rows),)

    def errors(self, layer: MoELayer, statistics: LayerStatistics) -> reconstruction.Errors:
        """Return the function that judges kept subsets C."""
        sample = reconstruction.Sample(
            layer, TokenSample.hidden(statistics[TokenSample(self.rows)])
        )
        return sample.judged_by(partial(sum_of_norms, batch=self.batch))

    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return the error without each single expert, float64 (E,)."""
        return reconstruction.errors_without_each(layer, self.errors(layer, statistics))

    def choose(
        self, layer: MoELayer, statistics: LayerStatistics, num_kept: int, guarded: Slots
    ) -> tuple[int, ...]:
        free = reconstruction.removable(layer, guarded, self.least_per_group(layer, num_kept))
        return search(layer, self.errors(layer, statistics), num_kept, free, self.limit)


@dataclass(frozen=True, kw_only=True)
class ProgressiveNAEE(Pruner):
    """The search on a pruned prefix, layer by layer.

    Attributes:
        rows, batch, limit: as for `NAEE`.
        target: Z is the original model's answer, or the unpruned layer's own on the new inputs.
    """

    rows: int = 512
    batch: int = 128
    limit: int = 2000
    target: Literal["original", "own"] = "original"

    paper: ClassVar[str] = "arXiv 2402.14800"
    driver: ClassVar[Literal["one_shot", "sequential"]] = "sequential"

    @property
    def measures(self) -> tuple[Statistic, ...]:
        rows = TokenSample(self.rows)
        return (rows, OriginalTokenSample(self.rows)) if self.target == "original" else (rows,)

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Refuse what compares layers."""
        if self.guard != "none" or allocation.compares:
            raise OutOfReach(
                f"progressive NAEE cannot reach guard={self.guard} with {allocation}: it measures "
                "one layer at a time; allowed: guard=none with allocation=uniform or per_layer"
            )
        return super().allocate(layers, statistics, budget, allocation)

    def errors(self, layer: MoELayer, statistics: LayerStatistics) -> reconstruction.Errors:
        """Return the function that judges kept subsets C, by their offset from the target too."""
        rows, target = TokenSample.hidden(statistics[TokenSample(self.rows)]), None
        if self.target == "original":
            original = TokenSample.hidden(statistics[OriginalTokenSample(self.rows)])
            target = layer.answer(original.to(layer.router_rows))
        return reconstruction.Sample(layer, rows, target).judged_by(
            partial(sum_of_norms, batch=self.batch)
        )

    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return the error without each single expert, float64 (E,)."""
        return reconstruction.errors_without_each(layer, self.errors(layer, statistics))

    def choose(
        self, layer: MoELayer, statistics: LayerStatistics, num_kept: int, guarded: Slots
    ) -> tuple[int, ...]:
        free = reconstruction.removable(layer, guarded, self.least_per_group(layer, num_kept))
        return search(layer, self.errors(layer, statistics), num_kept, free, self.limit)


def sum_of_norms(change: Tensor, batch: int) -> Tensor:
    """Return sum_batches || . ||_F of changes (n, C, H) of the answer by C subsets: (C,)."""
    squares = torch.linalg.vector_norm(change, dim=2).double().square()
    norms = [part.sum(dim=0).sqrt() for part in torch.split(squares, batch)]
    return torch.stack(norms).sum(dim=0)


def search(
    layer: MoELayer,
    errors: reconstruction.Errors,
    num_kept: int,
    free: reconstruction.Free,
    limit: int,
) -> tuple[int, ...]:
    """Try all subsets, or drop one expert at a time where there are more than `limit`."""
    experts = layer.num_experts
    if math.comb(experts, num_kept) <= limit:
        return reconstruction.exhaustive(errors, experts, num_kept, free)
    return reconstruction.coarse_to_fine(errors, experts, num_kept, free, least=layer.top_k)
