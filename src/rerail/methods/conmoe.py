"""ConMoE: slots share prototype experts (arXiv 2605.29350). No weight and no router row changes.

In a scope of W consecutive MoE layers (N = W E slots) a pool of P prototypes answers all slots:

    A_e  = sum_{X_e} g ||f|| / c_e              contribution (N,): g gate weight, f ungated output
    d_ab = mean over M in {gate, up, down} of 2 ||M_a - M_b||_F / (||M_a||_F + ||M_b||_F)   (N, N)
    r_e  = min_{b != e} d_eb                    how hard it is to replace (N,)
    score = minmax(A) minmax(r),  minmax(v) = (v - min v) / (max v - min v + 1e-12)

Prototypes are the P highest scores (at least `native` in each layer); every other slot goes to its
nearest prototype, ties to the lower id. Gate weights stay: two chosen slots with one prototype add
theirs.

The paper's formulas are not public; these are those of the implementation that cites it, which
plans layer by layer, as W = 1 does. W > 1 (the abstract's local scopes) takes minmax over the
scope; the paper's W of each model is not known. That code keeps floor((1 - ratio) E + 0.5)
prototypes; here E - int(E ratio), as everywhere, and P is their sum over the scope. Its other
distance is Euclidean between mean outputs over all tokens (`mean_output`); `routed_output` takes
the mean over routed tokens, `router_row` compares router rows. `fuse` is the abstract's ablation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.solvers.distances import between_rows, between_weights
from rerail.compress.templates.aliaser import Aliaser
from rerail.moe.model import MoELayer
from rerail.statistics.dense import OutputSum, TokenCount
from rerail.statistics.routed import Count, Moment, OutputSumRouted
from rerail.statistics.statistic import LayerStatistics, Statistic

MEANS: dict[str, tuple[Statistic, Statistic]] = {
    "mean_output": (OutputSum(), TokenCount()),
    "routed_output": (OutputSumRouted(), Count()),
}


@dataclass(frozen=True, kw_only=True)
class ConMoE(Aliaser):
    """Lets prototypes that are used much and hard to replace answer for the others.

    Attributes:
        distance: what of two experts is compared.
    """

    distance: Literal["weight", "mean_output", "routed_output", "router_row"] = "weight"

    paper: ClassVar[str] = "arXiv 2605.29350"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return tuple(dict.fromkeys([Moment(1, 1), Count(), *MEANS.get(self.distance, ())]))

    def compared(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        return statistics[Moment(1, 1)] / statistics[Count()].clamp(min=1)

    def distances(
        self, layers: Sequence[MoELayer], statistics: Sequence[LayerStatistics]
    ) -> Tensor:
        if self.distance == "weight":
            return between_weights([layer.stack() for layer in layers])
        if self.distance == "router_row":
            return between_rows(torch.cat([layer.router_rows.cpu() for layer in layers]))
        total, count = MEANS[self.distance]
        means = [view[total] / view[count].clamp(min=1).unsqueeze(1) for view in statistics]
        return between_rows(torch.cat(means))

    def score(self, contribution: Tensor, distances: Tensor) -> Tensor:
        hard = distances.clone().fill_diagonal_(torch.inf).min(dim=1).values
        return minmax(contribution) * minmax(hard)


def minmax(values: Tensor) -> Tensor:
    """Return values moved to [0, 1]."""
    return (values - values.min()) / (values.max() - values.min() + 1e-12)
