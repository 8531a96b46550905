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

from rerail.compress.base import Layers, Statistics
from rerail.compress.guard import Slots, guarded_slots
from rerail.compress.solvers import reconstruction
from rerail.compress.solvers.genetic import Removals, dealt, evolve
from rerail.compress.solvers.ranks import Ranks
from rerail.compress.solvers.whitening import Moments, layer_moments, moment_statistics
from rerail.compress.templates.factoriser import Factoriser, Integers
from rerail.compress.templates.pruner import Pruner
from rerail.compress.templates.sequence import TwoStages
from rerail.errors import InputError, OutOfReach
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Budget, dense_numbers, units_kept
from rerail.plan.plan import Plan
from rerail.statistics.statistic import AblationStatistic, LayerStatistics, Statistic
from rerail.statistics.token_sample import TokenSample


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
class InterExpert(Pruner):
    """Stage 1: a search for the removed set that changes the answer least on sampled rows.

    Attributes:
        importance: whose change counts, the `block`'s output or the `loss`.
        rows: n, how many inputs of the experts are sampled.
        population: removed sets in the first generation, and children in each further one.
        generations: how many follow the first.
        parents: share of the population that has children: the best of all so far.
        mutation: probability that a child exchanges one member.
        seed: of the search in each layer.
        nonuniform: deal what goes out over layers in inverse proportion to their importance;
            false, or another allocation than uniform, lets that say.
    """

    importance: Literal["block", "loss"] = "block"
    rows: int = 512
    population: int = 24
    generations: int = 12
    parents: float = 0.2
    mutation: float = 0.3
    seed: int = 0
    nonuniform: bool = True

    paper: ClassVar[str] = "arXiv 2411.01016"

    def __post_init__(self) -> None:
        if self.sequential:
            raise InputError(
                "compressor.first.sequential=true cannot be: MoE-I2 compares the importance of all "
                "layers before it prunes one; allowed: false"
            )

    @property
    def measures(self) -> tuple[Statistic, ...]:
        loss = (LossIncrease(),) if self.importance == "loss" else ()
        return (TokenSample(self.rows), *loss)

    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        if self.importance == "loss":
            return statistics[LossIncrease()].clamp(min=0)
        return reconstruction.errors_without_each(layer, self.errors(layer, statistics))

    def errors(self, layer: MoELayer, statistics: LayerStatistics) -> reconstruction.Errors:
        """Return the function || Z - Z_kept ||_F of kept subsets."""
        return reconstruction.Sample(
            layer, TokenSample.hidden(statistics[TokenSample(self.rows)])
        ).judged_by(norms)

    def choose(
        self, layer: MoELayer, statistics: LayerStatistics, num_kept: int, guarded: Slots
    ) -> tuple[int, ...]:
        """Return the best set that was tried; every router group loses the same number."""
        experts, groups = layer.num_experts, layer.num_groups
        free = reconstruction.removable(layer, guarded, self.least_per_group(layer, num_kept))
        fixed = set(range(experts)) - set(free(range(experts)))
        generator = torch.Generator().manual_seed(self.seed)
        removals = Removals(experts, groups, (experts - num_kept) // groups, fixed, generator)
        errors = self.errors(layer, statistics)
        return evolve(
            errors, removals, self.population, self.generations, self.parents, self.mutation
        )[0]

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Return kept experts: an important layer loses less."""
        if not self.nonuniform or not allocation.uniform:
            return super().allocate(layers, statistics, budget, allocation)
        guarded: list[Slots] = [frozenset()] * len(layers)
        importance = [1.0] * len(layers)
        if statistics is not None:
            views = [statistics.of(layer, self.requires) for layer in layers]
            guarded = guarded_slots(views, self.guard)
            scores = [self.score(layer, view) for layer, view in zip(layers, views, strict=True)]
            importance = [float(score.clamp(min=0).sum()) for score in scores]
        groups, experts = layers[0].num_groups, [layer.num_experts for layer in layers]
        caps = [_spare(layer, slots) for layer, slots in zip(layers, guarded, strict=True)]
        removed = budget.removed or 0.0
        total = (sum(experts) - units_kept(sum(experts), removed)) // groups
        if total > sum(caps):
            raise OutOfReach(
                f"{type(self).__name__} cannot remove {total * groups} of {sum(experts)} experts: "
                f"top-k routing, router groups and the guard leave {sum(caps) * groups} to choose "
                f"from; allowed ratios: 0 to {sum(caps) * groups / sum(experts):.4g}"
            )
        sums = torch.tensor(importance, dtype=torch.float64)
        # scaled first, so that the bound on tiny importances is relative
        weights = 1 / (sums / sums.max().clamp(min=1e-300)).clamp(min=1e-9)
        gone = dealt(weights, total, caps)
        return [n - groups * each for n, each in zip(experts, gone, strict=True)]


def norms(change: Tensor) -> Tensor:
    """Return the Frobenius norms of changes (n, C, H) by C subsets: float64 (C,)."""
    norm: Tensor = torch.linalg.vector_norm(change, dim=(0, 2), dtype=torch.float64)
    return norm


def _spare(layer: MoELayer, guarded: Slots) -> int:
    """Return how many experts every router group can lose."""
    size = layer.num_experts // layer.num_groups
    fixed = [sum(slot // size == g for slot in guarded) for g in range(layer.num_groups)]
    return size - max(layer.least_per_group, *fixed)


@dataclass(frozen=True, kw_only=True)
class IntraExpert(Factoriser):
    """Stage 2: a rank for each survivor by its importance.

    Attributes:
        alpha: exponent of the importance.
        whiten: weigh errors by the text; false is plain SVD, without data.
        shrink, ridge: how moments are made safe, see `whitening.Moments`.
        importance: I (M_l,) of a layer's survivors, by layer index; comes from stage 1.
    """

    alpha: float = 0.15
    whiten: bool = False
    shrink: float = 0.25
    ridge: float = 1e-6
    importance: Mapping[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    paper: ClassVar[str] = "arXiv 2411.01016"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return moment_statistics(self.whiten)

    def sizes(
        self, layer: MoELayer, max_numbers: int, statistics: LayerStatistics | None = None
    ) -> Integers:
        """Return R_le for each of the three matrices."""
        ranks = super().sizes(layer, max_numbers, statistics)
        return dict.fromkeys(("gate", "up", "down"), ranks["rank"])

    def ranks(self, layer: MoELayer) -> tuple[int, dict[str, Ranks]]:
        """Biases stay; one rank serves the three matrices of an expert."""
        n, p, d, _ = layer.dims
        biases, cap = dense_numbers(layer) - 3 * n * p * d, max(1, (p * d - 1) // (p + d))
        return biases, {"rank": Ranks(3 * (p + d), cap, n)}

    def scores(self, layer: MoELayer, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return (I + eps)^alpha; nothing where no importance is known."""
        own = self.importance.get(layer.index)
        if own is None or not own.max() > 0:
            return {}
        return {"rank": ((own / own.max()).clamp(min=0) + 1e-6) ** self.alpha}

    def moments(self, layer: MoELayer, statistics: LayerStatistics) -> dict[str, Moments]:
        return layer_moments(layer, statistics, self.whiten, self.shrink, self.ridge)


@dataclass(frozen=True, kw_only=True)
class MoEI2(TwoStages):
    """Both stages."""

    first: InterExpert = field(default_factory=InterExpert)
    second: IntraExpert = field(default_factory=IntraExpert)

    paper: ClassVar[str] = "arXiv 2411.01016"

    def second_stage(
        self, layers: Layers, views: Sequence[LayerStatistics], plan: Plan
    ) -> IntraExpert:
        """Hand the importance over that stage 1 saw."""
        kept = {part.layer: list(part.kept) for part in plan.layers}
        scores = {la.index: self.first.score(la, v) for la, v in zip(layers, views, strict=True)}
        cut = {i: score[kept.get(i, slice(None))] for i, score in scores.items()}
        return replace(self.second, importance=cut)
