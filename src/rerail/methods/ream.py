"""REAM: router-weighted expert activation merging (arXiv 2604.04356).

A merger that looks like a pruner: most kept experts stay as they are, and the few most salient ones
take in those that would be pruned.

1. Saliency is REAP's, S_e = mean over X_e of g_e ||f_e||_2; the M highest are centroids.
2. s_ij = ((1 + cos(o_i, o_j)) / 2 + 1 - d_ij / d_max) / 2, with o_e (H,) the mean gated output and
   d_ij = sqrt(2 - 2 cos) of the router logits of i and j over the text, d_max the layer's largest.
   `outputs=token` is eq. 8 as printed, the mean of cosines token by token, into which no gate can
   enter, since cosines know no scale. The paper's code, and the default, use the means.
3. From the most salient centroid on, each takes the nearest free experts until its group has C=size
   members. C = 1 merges nothing, which is REAP; size=null joins every expert to its most similar
   centroid, as M-SMoE does.
4. Hidden units of a member are matched to those of its centroid, see `ChannelMatching`: by what
   they do on the same tokens (`rows` of them) and by their weights in 64 principal components.
5. The group's expert is the mean of its aligned members, weighted by saliency, where 0 counts as
   min(1/2, the least that is not 0). The router keeps the centroids' rows.
6. Each layer is measured on the model whose earlier layers are merged already (`sequential`).

Not followed in the public code: tokens are drawn for every expert anew, so that activations of
different tokens are compared; its saliency multiplies by the gate twice and takes means of batch
means; gates are a softmax for every router (here what the model multiplied in, so that o_e is a sum
over the tokens that chose e); scores of components are scaled by singular values once more.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Decision, Layers, Statistics
from rerail.compress.router_rows import sliced
from rerail.compress.solvers import grouping
from rerail.compress.solvers.alignment import permuted
from rerail.compress.solvers.channel_matching import ChannelMatching
from rerail.compress.solvers.kernel_kmeans import output_gram
from rerail.compress.templates.merger import Merger
from rerail.errors import InputError, OutOfReach
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Budget
from rerail.statistics.moments import LogitGram
from rerail.statistics.routed import Count, GatedOutput, Moment
from rerail.statistics.statistic import LayerStatistics, Statistic
from rerail.statistics.token_sample import TokenSample


@dataclass(frozen=True, kw_only=True)
class REAM(Merger):
    """Merges pruned experts into the most salient ones.

    Attributes:
        size: C, most members of a group (the paper: 16 or 32 of 128 experts); None for no limit.
        outputs: whose cosine is taken, the `mean` gated output or outputs `token` by token.
        align: what hidden units are matched by; `none` leaves them.
        axes: principal components of the weights.
        rows: how many inputs are sampled.
        sequential: measure each layer on the model whose earlier layers are merged already.
    """

    router: Literal["remap", "centroid", "pooled"] = "centroid"
    size: int | None = 16
    outputs: Literal["mean", "token"] = "mean"
    align: Literal["both", "activations", "weights", "none"] = "both"
    axes: int = 64
    rows: int = 4096
    sequential: bool = True

    paper: ClassVar[str] = "arXiv 2604.04356"
    around_dominants: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise InputError(f"compressor.size={self.size} must be at least 1, or null")
        if self.size == 1 and self.router == "remap":
            raise InputError("compressor.size=1 merges nothing, and needs router=centroid")

    @property
    def driver(self) -> Literal["one_shot", "sequential"]:
        return "sequential" if self.sequential else "one_shot"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        if self.size == 1:
            return (Moment(1, 1), Count())
        means = (GatedOutput(1),) if self.outputs == "mean" else ()
        sampled = self.outputs == "token" or self.align in ("both", "activations")
        rows = (TokenSample(self.rows),) if sampled else ()
        return (Moment(1, 1), Count(), LogitGram(), *means, *rows)

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Return the number of groups in each layer, once they are known to have room for all."""
        if self.sequential and allocation.compares:
            raise OutOfReach(
                f"REAM cannot follow {allocation}: compressor.sequential=true measures one layer "
                "at a time; allowed: allocation=uniform or per_layer, or sequential=false"
            )
        counts = super().allocate(layers, statistics, budget, allocation)
        for layer, count in zip(layers, counts, strict=True):
            if self.size not in (1, None) and count * self.size < layer.num_experts:
                least = -(-layer.num_experts // self.size)
                raise OutOfReach(
                    f"layer {layer.index}: {count} groups of at most {self.size} have no room for "
                    f"{layer.num_experts} experts; allowed ratios: 0 to "
                    f"{1 - least / layer.num_experts:.4g}, or a larger compressor.size, or null"
                )
        return counts

    def usage(self, statistics: LayerStatistics) -> Tensor:
        """Return S (E,), REAP's score."""
        return statistics[Moment(1, 1)] / statistics[Count()].clamp(min=1)

    def weights(self, statistics: LayerStatistics) -> Tensor:
        saliency = self.usage(statistics).double()
        positive = saliency[saliency > 0]
        least = min(0.5, float(positive.min())) if len(positive) else 0.5
        return saliency.masked_fill(saliency <= 0, least)

    def similarity(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return s, float64 (E, E)."""
        logits = grouping.cosine(statistics[LogitGram()].double())
        apart = (2 - 2 * logits).clamp(min=0).sqrt().fill_diagonal_(0)
        if self.outputs == "token":
            alike = output_gram(layer, self.inputs(statistics), unit=True)
        else:
            mean = statistics[GatedOutput(1)].double()
            alike = grouping.cosine(mean @ mean.mT)
        return ((1 + alike) / 2 + 1 - apart / apart.max().clamp(min=1e-300)) / 2

    def inputs(self, statistics: LayerStatistics) -> Tensor:
        return TokenSample.hidden(statistics[TokenSample(self.rows)])

    def group(self, layer: MoELayer, statistics: LayerStatistics, num_stored: int) -> Tensor:
        centroids = self.dominants(layer, statistics, num_stored)
        similarity = self.similarity(layer, statistics)
        if self.size is None:
            return grouping.labels_around(similarity, centroids)
        score = self.usage(statistics)
        turns = sorted(centroids, key=lambda slot: (-float(score[slot]), slot))
        taken = grouping.absorbed(similarity, turns, self.size)
        # labels in the order of slots, as `solve` and the template count them
        return torch.argsort(torch.argsort(torch.tensor(turns)))[taken]

    def solve(
        self, layer: MoELayer, statistics: LayerStatistics, labels: Tensor
    ) -> tuple[grouping.Fused, tuple[str, ...]] | None:
        if self.align == "none":
            return None
        chosen = self.dominants(layer, statistics, int(labels.max()) + 1)
        inputs = None if self.align == "weights" else self.inputs(statistics)
        matching = ChannelMatching(layer, inputs, self.align, self.axes)

        def aligned(slot: int, expert: grouping.Fused) -> grouping.Fused:
            to = chosen[int(labels[slot])]
            return (
                expert if slot == to else permuted(expert, layer.layout, matching.order(to, slot))
            )

        return grouping.merged_experts(layer, labels, self.weights(statistics), aligned), ()

    def decide_layer(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Decision:
        if self.size == 1:
            return Decision(sliced(layer, self.dominants(layer, statistics, count)))
        return super().decide_layer(layer, statistics, count)
