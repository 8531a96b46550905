"""Factorisers: every expert is kept, its matrices are stored as solved tensors. Open: `factor`."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rerail.compress.base import Decision, LayerWise, untouched
from rerail.compress.solvers.whitening import Moments
from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation, PerLayer, Uniform, check_kept
from rerail.plan.budget import Ratio
from rerail.statistics.moments import InputMoment, MiddleMoment
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, Statistic, StatisticSet

# sizes of a form by name: an int, or a tuple with one for each expert
Integers = Mapping[str, Any]


def dense_numbers(layer: MoELayer) -> int:
    """Return how many numbers a layer's dense experts have."""
    return layer.expert_size * layer.num_experts


@dataclass(frozen=True, kw_only=True)
class Factoriser(LayerWise):
    """Stores solved tensors for all experts of a layer; a share is how many numbers it may store.

    Allocation is uniform (every layer gets the same share of its numbers) or per layer (a count of
    kept experts stands for their numbers). A layer that may store all of them stays as it is.

    Attributes:
        run: `materialised` expands the experts once, `lazy` at every forward.
    """

    run: Literal["materialised", "lazy"] = "materialised"

    paradigm: ClassVar[str] = "editing"

    @abstractmethod
    def sizes(
        self, layer: MoELayer, budget: int, statistics: LayerStatistics | None = None
    ) -> Integers:
        """Return the integers of the form (ranks, bases) for at most `budget` numbers.

        Without statistics (before any are there) it only says whether the budget can be met.

        Raises:
            OutOfReach: nothing fits.
        """

    @abstractmethod
    def factor(
        self, layer: MoELayer, statistics: LayerStatistics, sizes: Integers
    ) -> dict[str, Tensor]:
        """Return the solved tensors."""

    @abstractmethod
    def spec(self, layer: MoELayer, sizes: Integers) -> BankSpec:
        """Return the stored form."""

    def budgets(
        self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation
    ) -> list[int]:
        """Return the numbers that each layer may store."""
        if isinstance(allocation, Uniform):
            return [ratio.numbers_kept(layer) for layer in layers]
        if not isinstance(allocation, PerLayer):
            raise OutOfReach(
                f"allocation {allocation} counts experts, and {type(self).__name__} keeps them "
                "all; use allocation=uniform, or allocation=per_layer for shares of each layer"
            )
        kept = allocation.keep(layers, ratio, [], [])
        check_kept(layers, kept, [0] * len(layers))
        return [n * layer.expert_size for n, layer in zip(kept, layers, strict=True)]

    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """Find sizes for every layer, or say why not."""
        self.check_budgets(layers, self.budgets(layers, ratio, allocation))

    def check_budgets(self, layers: Sequence[MoELayer], budgets: Sequence[int]) -> None:
        """Find sizes for every layer that changes, or say why not."""
        for layer, budget in zip(layers, budgets, strict=True):
            if budget != dense_numbers(layer):
                self.sizes(layer, budget)

    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Ratio,
        allocation: Allocation,
    ) -> list[int]:
        """Return the numbers that each layer may store."""
        return self.budgets(layers, ratio, allocation)

    def decide(self, layer: MoELayer, statistics: LayerStatistics, share: int) -> Decision | None:
        """Solve the layer, unless it stays dense."""
        if share == dense_numbers(layer):
            return None
        sizes = self.sizes(layer, share, statistics)
        spec = self.spec(layer, sizes)
        if self.run == "lazy":
            spec = dataclasses.replace(spec, options={**spec.options, "run": "lazy"})
        return Decision(untouched(layer, spec), self.factor(layer, statistics, sizes))


class Ranks(NamedTuple):
    """Ranks to be chosen for one matrix type.

    Attributes:
        cost: numbers that one more rank stores.
        cap: the largest that makes sense.
        experts: how many there are, one each; None where one rank serves all.
    """

    cost: int
    cap: int
    experts: int | None


@dataclass(frozen=True, kw_only=True)
class RankFactoriser(Factoriser):
    """Pairs of thin factors, solved against second moments; ranks use the budget up exactly.

    Attributes:
        whiten: solve against the moments of the text; false is plain SVD, without data.
        shrink: how far rare experts lean on the layer's moment, as in `whitening.Moments`.
        ridge: added to a moment's diagonal, relative to its mean.
    """

    whiten: bool = True
    shrink: float = 0.25
    ridge: float = 1e-6

    @abstractmethod
    def ranks(self, layer: MoELayer) -> tuple[int, dict[str, Ranks]]:
        """Return the numbers stored whatever the ranks, and the ranks to be chosen."""

    def scores(self, layer: MoELayer, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return how ranks compare, (E,) for each matrix type; by default they are equal."""
        return {}

    @property
    def moments_required(self) -> tuple[Statistic, ...]:
        """What `moments` reads."""
        return (Count(), InputMoment(), MiddleMoment()) if self.whiten else ()

    def moments(self, layer: MoELayer, statistics: LayerStatistics) -> dict[str, Moments]:
        """Return the moments by matrix; gate and up share theirs.

        Raises:
            InputError: the text was too short for the solves.
        """
        n, p, d, _ = layer.dims
        sums: list[Tensor | None] = [None, None]
        count = torch.zeros(n)
        if self.whiten:
            count = statistics[Count()]
            sums = [statistics[InputMoment()], statistics[MiddleMoment()]]
        inputs, middle = (
            Moments(s, count, size, self.shrink, self.ridge)
            for s, size in zip(sums, (d, p), strict=True)
        )
        pairs = int(count.sum())
        inputs.check(f"layer {layer.index}, gate and up", pairs // layer.top_k)
        middle.check(f"layer {layer.index}, down", pairs)
        return {"gate": inputs, "up": inputs, "down": middle}

    def sizes(
        self, layer: MoELayer, budget: int, statistics: LayerStatistics | None = None
    ) -> Integers:
        """Return ranks that fill the budget to less than the cost of one more."""
        fixed, types = self.ranks(layer)
        spread = [(r, max(1, r.experts or 1)) for r in types.values()]
        costs = [r.cost for r, many in spread for _ in range(many)]
        caps = [r.cap for r, many in spread for _ in range(many)]
        self._check_reach(layer, budget, fixed, costs, caps)
        scores = self.scores(layer, statistics) if statistics is not None else {}
        even = {name: torch.ones(r.experts or 1) for name, r in types.items()}
        flat = torch.cat([(even | scores)[name].double().flatten() for name in types])
        found, at = filled(flat, costs, caps, budget - fixed), 0
        sizes: dict[str, Any] = {}
        for name, (rank, many) in zip(types, spread, strict=True):
            chosen = tuple(found[at : at + many])
            sizes[name], at = chosen if rank.experts else chosen[0], at + many
        return sizes

    def _check_reach(
        self, layer: MoELayer, budget: int, fixed: int, costs: Sequence[int], caps: Sequence[int]
    ) -> None:
        dense, least = dense_numbers(layer), fixed + sum(costs)
        most = fixed + sum(cost * cap for cost, cap in zip(costs, caps, strict=True))
        if least <= budget and (budget - most < max(costs) or budget >= dense):
            return
        low, high = max(0.0, 1 - most / dense), max(0.0, 1 - least / dense)
        raise OutOfReach(
            f"{type(self).__name__} cannot store layer {layer.index} in {budget / dense:.4g} of "
            f"its numbers: rank 1 takes {least / dense:.4g} of them, full rank {most / dense:.4g}; "
            f"ratios from {low:.4g} to {high:.4g} can be reached"
        )


def filled(scores: Tensor, costs: Sequence[int], caps: Sequence[int], budget: int) -> list[int]:
    """Return integers from 1 to their cap, in proportion to scores, that use the budget up.

    The real shares clamp(t * score, 1, cap) that cost just the budget are rounded down; what is
    left goes to the largest remainders, ties to the first. What remains is less than one cost.
    """
    cost, cap = torch.tensor(costs).double(), torch.tensor(caps).double()
    score = (scores / scores.max()).clamp(min=1e-9)

    def real(t: float) -> Tensor:
        return torch.minimum((t * score).clamp(min=1.0), cap)

    low, high = 0.0, float(cap.max() / score.min())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(cost @ real(middle)) <= budget else (low, middle)
    share = real(high) if float(cost @ real(high)) <= budget else real(low)
    ranks = (share + 1e-9).floor()
    left = budget - int(cost @ ranks)
    for i in torch.argsort(share - ranks, descending=True, stable=True).tolist():
        if ranks[i] < cap[i] and costs[i] <= left:
            ranks[i] += 1
            left -= costs[i]
    return [int(r) for r in ranks.tolist()]


def spare(layers: Sequence[MoELayer], budgets: Sequence[int], dense: Sequence[int]) -> list[int]:
    """Return budgets where some layers (by position) keep all numbers and the others pay for it.

    Raises:
        OutOfReach: nothing would be left for the others.
    """
    whole = {i: dense_numbers(layers[i]) for i in dense}
    rest = sum(b for i, b in enumerate(budgets) if i not in whole)
    left = sum(budgets) - sum(whole.values())
    if left <= 0:
        share = 1 - sum(whole.values()) / sum(dense_numbers(layer) for layer in layers)
        raise OutOfReach(
            f"{len(whole)} of {len(layers)} layers cannot stay dense at this ratio; ratios from 0 "
            f"to less than {share:.4g} can be reached"
        )
    return [whole[i] if i in whole else b * left // rest for i, b in enumerate(budgets)]
