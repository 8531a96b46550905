"""MoE-I2: non-uniform pruning, then a rank for each surviving expert (arXiv 2411.01016).

Stage 1, between experts. The importance of expert e of layer l is what is lost without it,

    I_le = || Z_l - Z_l(without e) ||_F  (`block`)   or   loss(without e) - loss  (`loss`)

with Z (n, H) the routed output on sampled inputs, tokens routed anew; negative I count as 0. Of all
experts that go, layer l loses a part proportional to 1 / sum_e I_le, as far as top-k lets it. A
genetic search finds the set with the least || Z - Z_kept ||_F. Router groups lose equal numbers.

Stage 2, inside experts. gate, up and down of survivor e become U V of rank

    R_le = (I_le + eps)^alpha / sum_j (I_lj + eps)^alpha * R * M_l,   alpha = 0.15

M_l survivors, R the mean rank, solved from the ratio; ranks lie below break-even, I H / (I + H).
eps is 1e-6 of the layer's largest I; I_le is that of the whole model.

No code of the authors was read, and these points are unknown:
* the loss of stage 1: notes say the model's, a reimplementation the block's output (`importance`).
* counts by 1 / I are the reimplementation's; `nonuniform=false`, or an allocation, decides instead.
* plain SVD or whitened by the text (`whiten`), and the share of what goes in stage 1 (`share`).
The floor in R undershoots the budget; here remainders are given out. The paper's search has 100
sets and 50 generations (preset moe_i2_paper). Left out: the joint choice among the K best sets of T
layers (KT reception field), which needs the attention between them; LoRA (Router KD follows).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.solvers.whitening import low_rank
from rerail.compress.templates.factoring import Integers, RankFactoriser, Ranks, dense_numbers
from rerail.compress.templates.genetic import GeneticPruner
from rerail.compress.templates.sequence import Chain
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.plan import Plan
from rerail.statistics.statistic import AblationStatistic, LayerStatistics, Statistic


@dataclass(frozen=True)
class LossIncrease(AblationStatistic):
    """Increase of the loss when a slot is never selected (MoE-I2's importance). float64 (E,).

    A sum over the targets of the text, in nats, so that shards add: divide by the targets for the
    increase a token.
    """

    axes = "E"

    def measure(self, plain: float, without: float, tokens: int) -> Tensor:
        return torch.tensor(without - plain, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class InterExpert(GeneticPruner):
    """Stage 1."""

    importance: Literal["block", "loss"] = "block"

    @property
    def measures(self) -> tuple[Statistic, ...]:
        """Sampled inputs, and the loss where it counts."""
        loss = (LossIncrease(),) if self.importance == "loss" else ()
        return (*super().measures, *loss)

    def rank(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return I_le, float64 (E,)."""
        if self.importance == "loss":
            return statistics[LossIncrease()].clamp(min=0)
        return super().rank(layer, statistics)


@dataclass(frozen=True, kw_only=True)
class IntraExpert(RankFactoriser):
    """Stage 2; `importance` (M,) of a layer's survivors, by layer index, comes from stage 1."""

    whiten: bool = False
    alpha: float = 0.15
    importance: Mapping[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def requires(self) -> tuple[Statistic, ...]:
        """Moments, if it whitens."""
        return self.moments_required

    def ranks(self, layer: MoELayer) -> tuple[int, dict[str, Ranks]]:
        """Biases stay; one rank serves the three matrices of an expert."""
        n, p, d, _ = layer.dims
        biases, cap = dense_numbers(layer) - 3 * n * p * d, max(1, (p * d - 1) // (p + d))
        return biases, {"rank": Ranks(3 * (p + d), cap, n)}

    def scores(self, layer: MoELayer, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return (I + eps)^alpha; equal where no importance is known."""
        held = self.importance.get(layer.index)
        if held is None or not held.max() > 0:
            return {}
        return {"rank": ((held / held.max()).clamp(min=0) + 1e-6) ** self.alpha}

    def spec(self, layer: MoELayer, sizes: Integers) -> BankSpec:
        """Return the low-rank form."""
        ranks = {name: sizes["rank"] for name in ("gate", "up", "down")}  # noqa: C420
        return BankSpec("low_rank", layer.num_experts, (), ranks, {"rows": "own"})

    def factor(
        self, layer: MoELayer, statistics: LayerStatistics, sizes: Integers
    ) -> dict[str, Tensor]:
        """Solve each matrix of each expert."""
        moments, found = self.moments(layer, statistics), dict[str, Tensor]()
        for name, stack in layer.stack()._asdict().items():
            found[f"{name}.U"], found[f"{name}.V"] = low_rank(stack, moments[name], sizes["rank"])
        return found


@dataclass(frozen=True, kw_only=True)
class MoEI2(Chain):
    """Both stages."""

    first: InterExpert = field(default_factory=InterExpert)
    second: IntraExpert = field(default_factory=IntraExpert)

    paper: ClassVar[str] = "arXiv 2411.01016"

    def prepared(
        self, layers: Sequence[MoELayer], views: Sequence[LayerStatistics], plan: Plan
    ) -> IntraExpert:
        """Hand the importance over that stage 1 saw."""
        kept = {part.layer: list(part.kept) for part in plan.layers}
        ranks = {la.index: self.first.rank(la, v) for la, v in zip(layers, views, strict=True)}
        cut = {i: rank[kept.get(i, slice(None))] for i, rank in ranks.items()}
        return replace(self.second, importance=cut)
