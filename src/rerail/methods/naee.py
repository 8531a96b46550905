"""NAEE: not all experts are equal, pruning by layer reconstruction (arXiv 2402.14800).

Of all subsets C of r experts, keep the one whose layer answers most like the whole layer:

    C = argmin  sum_batches || Z - Z_C ||_F ,    Z, Z_C (rows of a batch, H)

with Z the routed output and Z_C the same with the other experts' logits at -inf (so gates are
renormalised, or not, as the model does it). Shared experts cancel. The norm is not squared.

The published rule takes one norm for each of 128 sequences of 2,048 tokens: `sequences` says how
many are sampled, whole. By default `rows` tokens of the text are sampled, a batch being `batch` of
these. Beyond `limit` subsets (Mixtral has 70), experts go one at a time, each time the one whose
loss costs least; that is not in the paper.

With `sequential` (the code's progressive search) each layer's inputs come from the model whose
earlier layers are pruned already. As in the code, its Z stays that of the original model on the
same tokens (`target=original`); `target=own` asks instead for what the unpruned layer answers on
the new inputs.

What allocations compare is the error without each single expert, which the paper does not define.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.guard import Slots
from rerail.compress.solvers import reconstruction
from rerail.compress.templates.pruner import Pruner
from rerail.errors import InputError
from rerail.moe.model import MoELayer
from rerail.statistics.segments import OriginalSegments, Segments
from rerail.statistics.statistic import LayerStatistics, Statistic
from rerail.statistics.token_sample import OriginalTokenSample, TokenSample


@dataclass(frozen=True, kw_only=True)
class NAEE(Pruner):
    """The search over kept subsets.

    Attributes:
        rows: how many tokens are sampled.
        batch: how many of them share one norm.
        sequences: how many whole sequences are sampled instead, each with a norm of its own.
        limit: how many subsets are tried before the search goes greedy.
        target: with `sequential`, whether Z is the original model's answer or the layer's own.
    """

    rows: int = 512
    batch: int = 128
    sequences: int | None = None
    limit: int = 2000
    target: Literal["original", "own"] = "original"

    paper: ClassVar[str] = "arXiv 2402.14800"

    def __post_init__(self) -> None:
        if self.sequences is not None and self.sequences < 1:
            raise InputError(f"compressor.sequences={self.sequences} must be at least 1, or null")

    @property
    def measures(self) -> tuple[Statistic, ...]:
        both: tuple[Statistic, Statistic] = (TokenSample(self.rows), OriginalTokenSample(self.rows))
        if self.sequences:
            both = Segments(self.sequences), OriginalSegments(self.sequences)
        return both if self.sequential and self.target == "original" else both[:1]

    def errors(self, layer: MoELayer, statistics: LayerStatistics) -> reconstruction.Errors:
        """Return the function that judges kept subsets C."""
        sample, *original = (statistics[which] for which in self.measures)
        target, lengths = None, torch.bincount(Segments.labels(sample)).tolist()
        if original:
            target = layer.answer(TokenSample.hidden(original[0]).to(layer.router_rows))
        judged = reconstruction.Sample(layer, TokenSample.hidden(sample), target)
        parts = lengths if self.sequences else self.batch
        return judged.judged_by(partial(sum_of_norms, parts=parts))

    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        return reconstruction.errors_without_each(layer, self.errors(layer, statistics))

    def choose(
        self, layer: MoELayer, statistics: LayerStatistics, num_kept: int, guarded: Slots
    ) -> tuple[int, ...]:
        free = reconstruction.removable(layer, guarded, self.least_per_group(layer, num_kept))
        errors, experts = self.errors(layer, statistics), layer.num_experts
        if math.comb(experts, num_kept) <= self.limit:
            return reconstruction.exhaustive(errors, experts, num_kept, free)
        return reconstruction.coarse_to_fine(errors, experts, num_kept, free, least=layer.top_k)


def sum_of_norms(change: Tensor, parts: int | list[int]) -> Tensor:
    """Return sum || . ||_F over parts (of equal or listed rows) of changes (n, C, H): (C,)."""
    squares = torch.linalg.vector_norm(change, dim=2).double().square()
    norms = [part.sum(dim=0).sqrt() for part in torch.split(squares, parts)]
    return torch.stack(norms).sum(dim=0)
