"""MoDeGPT on experts: Nystrom narrowing with a refit (arXiv 2408.09632, section 3.2, Type I).

With h = act(gate x) * up x (I,) and C = sum_x g(x)^gate_power h h^T over the tokens x of an expert
(power 2 weighs by the error in the layer's output), every expert keeps the k = int((1 - ratio) I)
channels J of the highest ridge leverage, and its down projection answers for those that went:

    lev_i = [C (C + l 1)^-1]_ii,  down' = argmin_D sum ||down h - D h_J||^2 = down C[:,J] C[J,J]^-1

C is never pooled: channel j of two experts has nothing in common. Layers lose the same, or
(`spread=influence`, section 3.3) phi_l = L ratio softmax(-s / epsilon)_l, at most `cap`, with
s_l = 1 - mean cos of the residual stream into and out of decoder layer l.

Ours, where a public reimplementation differs: l = ridge tr(C) / I, there not normalised; the refit
shrinks to the sliced down (there to 0), by 1e-6 of the mean diagonal, or 1e-2 below 4 k tokens; one
without tokens keeps the highest ||gate_j|| ||up_j|| ||down_j||; `rank=energy`: C_ii ||down_i||^2.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rerail.compress.base import Layers, Statistics
from rerail.compress.solvers.energy import squared_norms
from rerail.compress.solvers.layer_shares import influence_shares
from rerail.compress.solvers.nystrom import channel_sizes, leverages, refitted_down
from rerail.compress.templates.narrower import Narrower
from rerail.errors import InputError
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Budget
from rerail.statistics.block_influence import BlockInfluence
from rerail.statistics.moments import MiddleMoment
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, Statistic
from rerail.transfer import moved


@dataclass(frozen=True, kw_only=True)
class MoDeGPT(Narrower):
    """Keeps the channels that others cannot replace, and refits down to them; see above.

    Attributes:
        refit: false leaves the kept columns of down as they are.
    """

    widths: Literal["ragged", "uniform"] = "uniform"
    refit: bool = True
    rank: Literal["leverage", "energy"] = "leverage"
    gate_power: Literal[0, 2] = 0
    ridge: float = 0.01
    spread: Literal["uniform", "influence"] = "uniform"
    epsilon: float = 0.015
    cap: float = 0.8

    paper: ClassVar[str] = "arXiv 2408.09632"

    def __post_init__(self) -> None:
        if min(self.ridge, self.epsilon) <= 0:
            raise InputError(f"compressor.ridge={self.ridge}, epsilon={self.epsilon}: allowed: > 0")

    @property
    def requires(self) -> tuple[Statistic, ...]:
        counts = (Count(),) if self.refit else ()
        turned = (BlockInfluence(),) if self.spread == "influence" else ()
        return (MiddleMoment(self.gate_power), *counts, *turned)

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        if self.spread == "uniform" or budget.removed is None:
            return super().allocate(layers, statistics, budget, allocation)
        views = [None if statistics is None else statistics.of(la, self.requires) for la in layers]
        shares = influence_shares(views, budget.removed, allocation, self.epsilon, self.cap)
        return [self.count(layer, share) for layer, share in zip(layers, shares, strict=True)]

    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        moments, experts = statistics[MiddleMoment(self.gate_power)], layer.stack()
        if self.rank == "energy":
            return moments.diagonal(dim1=1, dim2=2) * squared_norms(experts.down).cpu()
        scores = -1 / channel_sizes(experts)  # below every leverage
        for e in moments.any(dim=-1).any(dim=-1).nonzero().flatten().tolist():
            scores[e] = leverages(moved(moments[e], scores.device), self.ridge)
        return scores.cpu()

    def refitted(self, layer: MoELayer, statistics: LayerStatistics, kept: Tensor) -> Tensor:
        if not self.refit:
            return super().refitted(layer, statistics, kept)
        moments, counts = statistics[MiddleMoment(self.gate_power)], statistics[Count()]
        return refitted_down(layer.stack().down, moments, kept, counts)
