"""Factorisers: every expert is kept, its matrices are stored as solved tensors. Open: `factor`."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from rerail.compress.base import Compressor, Counts, Decision, Layers, Statistics, Views, untouched
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation, removed_shares
from rerail.plan.budget import Budget, dense_numbers, numbers_kept
from rerail.statistics.statistic import LayerStatistics

# sizes of a form by name: an int, or a tuple with one for each expert
Integers = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Factoriser(Compressor):
    """Stores solved tensors for all experts of a layer; a count is of numbers that it may store.

    A layer that may store all of its numbers stays as it is.

    Attributes:
        run: `materialised` expands the experts once, `lazy` at every forward.
    """

    run: Literal["materialised", "lazy"] = "materialised"

    paradigm: ClassVar[str] = "editing"
    allocations: ClassVar[Literal["any", "fixed", "uniform"]] = "fixed"

    @abstractmethod
    def sizes(
        self, layer: MoELayer, max_numbers: int, statistics: LayerStatistics | None = None
    ) -> Integers:
        """Return the integers of the form (ranks, bases) for at most so many numbers.

        Without statistics (before any are known) it only says whether they are enough.

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

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Return the numbers that each layer may store."""
        return self.reached(layers, most_numbers(layers, budget, allocation))

    def reached(self, layers: Layers, counts: list[int]) -> list[int]:
        """Return the counts, once sizes were found for every layer that changes.

        Raises:
            OutOfReach: nothing fits in one of them.
        """
        for layer, max_numbers in zip(layers, counts, strict=True):
            if max_numbers != dense_numbers(layer):
                self.sizes(layer, max_numbers)
        return counts

    def decide(self, layers: Layers, statistics: Views, counts: Counts) -> list[Decision]:
        """Solve each layer, unless it stays dense."""
        decisions = []
        for layer, view, max_numbers in zip(layers, statistics, counts, strict=True):
            if max_numbers == dense_numbers(layer):
                continue
            sizes = self.sizes(layer, max_numbers, view)
            spec = self.spec(layer, sizes)
            if self.run == "lazy":
                spec = dataclasses.replace(spec, options={**spec.options, "run": "lazy"})
            decisions.append(Decision(untouched(layer, spec), self.factor(layer, view, sizes)))
        return decisions


def most_numbers(layers: Layers, budget: Budget, allocation: Allocation) -> list[int]:
    """Return how many numbers each layer may store under a budget."""
    shares = removed_shares(layers, budget, allocation)
    return [
        numbers_kept(dense_numbers(la), share) for la, share in zip(layers, shares, strict=True)
    ]
