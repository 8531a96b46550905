"""M-SMoE: experts merge into the dominant ones (arXiv 2310.01334, section 3, algorithm 1).

1. s_ij = cos(Z[:, i], Z[:, j]) with Z (T, E) the router logits of all tokens, from the Gram matrix
   sum z z^T (E, E). `similarity_of=rows` takes the router rows (E, H) in their place, the paper's
   runner-up that needs no text; its code maps s to (s + 1) / 2, which changes no order.
2. The M most used experts of a layer are dominant, f_e the usage count. The paper lets layers
   compete: u_e = f_e / sum_e f_e, the top expert of each layer set to 1, the M L largest kept; that
   is `allocation=global` (its code takes all above the (M L)-th value, which miscounts ties).
   `allocation=uniform` keeps M in each. Switch's first MoE layer, which the paper leaves alone, is
   `allocation=per_layer` with all its experts kept.
3. Every other expert joins the dominant expert of its layer with the highest s.
4. W_c = sum_{e in c} f_e P_e W_e / sum_{e in c} f_e, accumulated in float32, with P_e the
   permutation of hidden units that aligns e by weight matching to the group's dominant expert
   (`align=dominant`), to expert 0 of the layer as the paper's algorithm has it (`align=first`), or
   none, as in its Mixtral script (`align=none`, cheaper where I is large). A group of one is left
   as it is, and a group that was never used is averaged (its code makes zeros of it).
5. The router keeps its E rows (`router=remap`); the template offers the other policies.

The public code labels dominant experts in the loop over all, so that one can lose its own label;
here they keep it. The second half, MC-SMoE (low rank plus sparse, fitted by distillation), is left
to factorisers.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rerail.compress.solvers import grouping
from rerail.compress.solvers.alignment import channel_features, permuted, weight_matching
from rerail.compress.templates.merger import Merger
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer
from rerail.statistics.moments import LogitGram
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class MSMoE(Merger):
    """Merges experts into the dominant one that the router treats most alike.

    Attributes:
        similarity_of: router `logits` over the text (the paper) or router `rows`.
        align: which expert hidden units are matched to: the group's `dominant`, the layer's
            `first`, or `none`.
    """

    similarity_of: Literal["logits", "rows"] = "logits"
    align: Literal["dominant", "first", "none"] = "dominant"

    paper: ClassVar[str] = "arXiv 2310.01334"
    around_dominants: ClassVar[bool] = True

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return (Count(), LogitGram()) if self.similarity_of == "logits" else (Count(),)

    def group(self, layer: MoELayer, statistics: LayerStatistics, num_stored: int) -> Tensor:
        dominants = self.dominants(layer, statistics, num_stored)
        return grouping.labels_around(self.similarity(layer, statistics), dominants)

    def similarity(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return s (E, E), the cosines of router logits, or of router rows."""
        if self.similarity_of == "logits":
            return grouping.cosine(statistics[LogitGram()].double())
        return grouping.cosine(grouping.weight_gram(layer.router_rows))

    def solve(
        self, layer: MoELayer, statistics: LayerStatistics, labels: Tensor
    ) -> tuple[grouping.Fused, tuple[str, ...]] | None:
        if self.align == "none":
            return None
        stock, layout = expert_parameters(layer.stock()), layer.layout
        chosen = self.dominants(layer, statistics, int(labels.max()) + 1)
        references: dict[int, Tensor] = {}

        def aligned(slot: int, expert: grouping.Fused) -> grouping.Fused:
            to = 0 if self.align == "first" else chosen[int(labels[slot])]
            if slot == to:
                return expert
            if to not in references:
                whole = {name: p.detach()[to] for name, p in stock.items()}
                references[to] = channel_features(whole, layout)
            order = weight_matching(references[to], channel_features(expert, layout))
            return permuted(expert, layout, order)

        return grouping.merged_experts(layer, labels, self.weights(statistics), aligned), ()
