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
from rerail.statistics.statistic import LayerStatistics, RoutedTokens, Statistic
from rerail.statistics.token_sample import TokenSample, hashed, keyed, keys_of


@dataclass(frozen=True)
class Segments(TokenSample):
    """The inputs of the experts in up to `count` segments of `length` tokens. float32 (N, H + 2).

    As `TokenSample`, with the hash of a token's segment, position // length: segments are kept or
    left out as a whole, so N varies with padding. Rows of one segment lie together.
    """

    length: int

    def measure(self, tokens: RoutedTokens) -> Tensor:
        assert tokens.position is not None
        return self._cut(keyed(hashed(tokens.position // self.length), tokens.hidden))

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return self._cut(torch.cat([a, b]))

    def _cut(self, rows: Tensor) -> Tensor:
        keys = keys_of(rows)
        order = keys.argsort(stable=True)
        return rows[order][_runs(keys[order]) < self.count]

    @staticmethod
    def labels(tensor: Tensor) -> Tensor:
        """Return the segment of each row of a filled statistic, int64 (n,) from 0 on."""
        return _runs(keys_of(tensor))


def _runs(keys: Tensor) -> Tensor:
    """Number the runs of equal keys."""
    return F.pad((keys[1:] != keys[:-1]).long().cumsum(dim=0), (1, 0))[: len(keys)]


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
        """Return D without each single expert, float64 (E,)."""
        return reconstruction.errors_without_each(layer, self.errors(layer, statistics))

    def choose(
        self, layer: MoELayer, statistics: LayerStatistics, num_kept: int, guarded: Slots
    ) -> tuple[int, ...]:
        """Drop one expert at a time, groups before members."""
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
    """Return the mean norm of segment means, for changes (n, C, H) by C subsets: float64 (C,).

    Labels (n,) say which segment a row is of.
    """
    members = torch.nn.functional.one_hot(labels).to(change).T
    means = members / members.sum(dim=1, keepdim=True)
    moved: Tensor = torch.tensordot(means, change, dims=1)
    return moved.square().sum(dim=2).double().sqrt().mean(dim=0)
