"""CFES: coarse-to-fine expert selection ("Compressing Large MoE Models via Efficient Pruning and
Data-Aware Calibration", OpenReview dJy6z9peC7).

Known from abstract, reviews and the configuration others published (`c2f`, `segment_mean`, `l2`):
experts leave greedily by the discrepancy of the layer's output, first judged in sequential groups,
then singly in the chosen group, O(n^1.5) evaluations; outputs are averaged over token segments.
The rest is inferred here, from the evaluations it reports (2.06e5 for 256 -> 128 in 58 layers):

1. experts are removed, one a round, until `count` are left;
2. a round cuts those that may go, in id order, into groups of S = round(sqrt(E)) (`size`);
3. each group is judged by the discrepancy with all of it removed, the best group is opened;
4. each of its members is judged by the discrepancy without it, and the best is removed.

    D(C) = mean over segments t of || mean_{x in t} ( y(x) - y_C(x) ) ||_2

with y (H,) the routed output and y_C the same where only C may be selected, `segments` segments
(S_t of them) of `length` tokens, whose length is not known. The score of a group, the direction
(removal, not addition) and the mean over segments are guesses. Near the end S is cut down so that
top_k experts stay while a group is judged. S = E and S = 1 are the plain greedy search.

Its dynamic mixing of calibration domains (weights grow with a domain's discrepancy) needs one
statistic a domain and constants that are not known, and is not offered. What allocations compare is
the discrepancy without each single expert.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.compress.guard import Slots
from rerail.compress.solvers import reconstruction
from rerail.compress.templates.pruner import Pruner
from rerail.moe.model import MoELayer
from rerail.statistics.segments import Segments
from rerail.statistics.statistic import LayerStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class CFES(Pruner):
    """The search over groups, then members, as far as it is known.

    Attributes:
        segments: how many segments are sampled.
        length: tokens in a segment; 1 compares single tokens.
        size: experts in a group; None for round(sqrt(E)).
    """

    segments: int = 32
    length: int = 16
    size: int | None = None

    paper: ClassVar[str] = "OpenReview dJy6z9peC7"

    @property
    def measures(self) -> tuple[Statistic, ...]:
        return (Segments(self.segments, self.length),)

    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        return reconstruction.errors_without_each(layer, self.errors(layer, statistics))

    def choose(
        self, layer: MoELayer, statistics: LayerStatistics, num_kept: int, guarded: Slots
    ) -> tuple[int, ...]:
        free = reconstruction.removable(layer, guarded, self.least_per_group(layer, num_kept))
        size = self.size or round(math.sqrt(layer.num_experts))
        errors, experts = self.errors(layer, statistics), layer.num_experts
        return reconstruction.coarse_to_fine(errors, experts, num_kept, free, size, layer.top_k)

    def errors(self, layer: MoELayer, statistics: LayerStatistics) -> reconstruction.Errors:
        """Return the function D of kept subsets."""
        segments = statistics[self.measures[0]]
        measure = partial(mean_distance, labels=Segments.labels(segments))
        return reconstruction.Sample(layer, Segments.hidden(segments)).judged_by(measure)


def mean_distance(change: Tensor, labels: Tensor) -> Tensor:
    """Return the mean norm of the means of segments, by label (n,), of changes (n, C, H): (C,)."""
    members = F.one_hot(labels).to(change).T
    means = members / members.sum(dim=1, keepdim=True)
    moved: Tensor = torch.tensordot(means, change, dims=1)
    return moved.square().sum(dim=2).double().sqrt().mean(dim=0)
