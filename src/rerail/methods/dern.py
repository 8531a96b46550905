"""DERN: dropped experts, redistributed neurons (arXiv 2509.10377, EMNLP 2025 Findings).

1. s_e = sum of the gate weights over the tokens that chose e; the M highest of a layer stay.
2. An expert is the sum of its I segments (row j of W_G and W_U, column j of W_D). Each segment of a
   dropped expert o goes to the kept expert r whose segment is most similar by the cosine of [u | d]
   (`features=up_down`; `all` takes g too), if that is above alpha; else it is lost.
3. Router rows G_r + sum_o (n_or / I) G_o, with n_or the segments that r got from o.
4. In r, its own and the received segments become I again: spherical k-means of [g | u | d] with
   weights s of where they come from, started from its own (`init=own`) or from those of the largest
   max g + |min g| among all (`magnitude`). A mean has the mean norm of its members.

The paper's text was not read: alpha (0.4 to 0.6 is told of), norms, the start, and the addition of
rows (not of scores) are second-hand. Ours: segments are compared and averaged up to the sign that
(g, -u, -d) = (g, u, d) leaves free (`signs`; not in gpt_oss, whose product is no odd function of
u); `multiplicity=scaled` multiplies d by the number of r's own segments in the mean, which the
plain mean loses. Without anything received (alpha = 1) this is pruning.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Decision
from rerail.compress.router_rows import sliced
from rerail.compress.solvers.grouping import whole_experts, wide
from rerail.compress.solvers.segments import (
    Absorption,
    Features,
    Start,
    fused_segments,
    nearest,
    redistributed,
    segments_of,
    signs_are_free,
)
from rerail.compress.templates.pruner import Pruner
from rerail.errors import InputError
from rerail.moe.model import MoELayer
from rerail.plan.plan import ROWS, LayerPlan
from rerail.statistics.routed import Moment
from rerail.statistics.statistic import LayerStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class DERN(Pruner):
    """Keeps the experts of the highest soft counts, which take in segments of the others.

    Attributes:
        alpha, features, init, signs, multiplicity: see above.
    """

    alpha: float = 0.6
    features: Features = "up_down"
    init: Start = "own"
    signs: bool = True
    multiplicity: Literal["mean", "scaled"] = "mean"

    paradigm: ClassVar[str] = "merging"
    paper: ClassVar[str] = "arXiv 2509.10377"

    def __post_init__(self) -> None:
        if not -1 <= self.alpha <= 1:
            raise InputError(f"compressor.alpha={self.alpha} is outside [-1, 1]")
        if self.router != "slice":
            raise InputError(f"compressor.router={self.router}: DERN adds rows; allowed: slice")

    @property
    def measures(self) -> tuple[Statistic, ...]:
        return (Moment(1, 0),)

    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        return statistics[Moment(1, 0)]

    def formed(
        self, layer: MoELayer, statistics: LayerStatistics, kept: tuple[int, ...]
    ) -> Decision:
        """Return the plan of whole experts and pooled rows."""
        dropped = [e for e in range(layer.num_experts) if e not in kept]
        segments, signs = segments_of(layer), self.signs and signs_are_free(layer)
        stay, go = segments.at(list(kept)), segments.at(dropped)
        index, cosine = nearest(go.flat(), stay.flat(), self.features, signs)
        to = torch.where(cosine > self.alpha, index // layer.intermediate_size, -1)
        if not (to >= 0).any():
            return Decision(sliced(layer, kept))
        how = Absorption(self.init, signs, self.multiplicity == "scaled")
        score = self.score(layer, statistics)
        joined, shares = redistributed(stay, go, to, (score[list(kept)], score[dropped]), how)
        spec, tensors = whole_experts(layer, fused_segments(layer, joined, list(kept)))
        rows = layer.router_rows.detach().cpu()
        pooled = rows[list(kept)].double() + shares @ rows[dropped].double()
        plan = LayerPlan(layer.index, kept, tuple(range(len(kept))), "pooled", spec)
        return Decision(plan, {**tensors, ROWS: pooled.to(wide(rows.dtype))})
