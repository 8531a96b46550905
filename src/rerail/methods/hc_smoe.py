"""HC-SMoE: hierarchical clustering of experts by their mean outputs (arXiv 2410.08589, section 3).

1. o_e = (1/T) sum_t E_e(x_t), every expert on every token, ungated: (E, H).
2. d_ij = ||o_i - o_j||_2.
3. Agglomerative clustering; average linkage d(A, B) = mean of d_ij over A x B, until M clusters.
4. W_c = sum_{e in c} f_e W_e / sum_{e in c} f_e with f_e the usage count (`merge=frequency`), or
   the plain mean (`merge=average`); accumulated in float32. An unused cluster is averaged.
5. The router keeps its E rows (`router=remap`); the slots of a cluster share its expert. The
   template offers the other policies, with the most used member as centroid.
6. Layers share the ratio evenly, or by usage as in M-SMoE (`allocation=global`, which the code
   calls dynamic), whatever `merge` is.

Public code differs in three places that are not followed: its complete linkage joins the farthest
pair, its Ward uses unsquared distances, and its Qwen counts assume top-2. Linkage here is scipy's.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor

from rerail.compress.templates.merger import Merger
from rerail.moe.model import MoELayer
from rerail.statistics.dense import OutputSum, TokenCount
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics


@dataclass(frozen=True, kw_only=True)
class HCSMoE(Merger):
    """Merges clusters of experts with alike mean outputs.

    Attributes:
        linkage: how clusters are compared; the paper's choice is `average`.
        merge: `frequency` weighs members by usage, `average` equally.
    """

    linkage: Literal["average", "single", "complete", "ward"] = "average"
    merge: Literal["frequency", "average"] = "frequency"

    paper: ClassVar[str] = "arXiv 2410.08589"

    requires = (OutputSum(), TokenCount(), Count())

    def group(self, layer: MoELayer, statistics: LayerStatistics, num_stored: int) -> Tensor:
        """Return cluster labels (E,), numbered by their lowest member."""
        mean = statistics[OutputSum()] / statistics[TokenCount()].clamp(min=1).unsqueeze(1)
        tree = linkage(mean.numpy(), method=self.linkage, metric="euclidean")
        return torch.from_numpy(cut_tree(tree, n_clusters=num_stored).flatten().copy()).long()

    def weights(self, statistics: LayerStatistics) -> Tensor:
        counts = self.usage(statistics)
        return counts if self.merge == "frequency" else torch.ones_like(counts)
