"""Allocations: how layers share what a budget takes away."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerail.errors import InputError, OutOfReach
from rerail.moe.model import MoELayer
from rerail.plan.budget import Budget, units_kept

Layers = Sequence[MoELayer]
Scores = Sequence[Tensor] | None  # one (E,) a layer; None before any are known


class Allocation(ABC):
    """Says which share every layer loses; a template turns shares into counts of its own unit.

    Attributes:
        uniform: whether every layer loses the share that was asked for.
        compares: whether scores of different layers compete; else shares are known before any.
        searches: whether it must judge students, see `with_fitness`.
    """

    uniform: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    searches: ClassVar[bool] = False

    @abstractmethod
    def shares(
        self, layers: Layers, removed: float, least: Sequence[int], scores: Scores = None
    ) -> list[float]:
        """Return the removed share of each layer; a share of n in E experts is exactly n / E.

        Args:
            layers: the layers that are compressed.
            removed: the share of all of them that goes.
            least: how many experts each layer must keep.
            scores: one (E,) tensor a layer, higher means keep; None before any are known, when
                they count as equal.
        """

    def with_fitness(self, fitness: Callable[[tuple[int, ...]], float]) -> "Allocation":
        """Return the allocation once it can judge counts of kept experts; by default itself."""
        return self

    def lineage(self) -> dict[str, object]:
        """Return what a plan should say about how shares came about; by default nothing."""
        return {}


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every layer loses the same share."""

    uniform: ClassVar[bool] = True

    def shares(
        self, layers: Layers, removed: float, least: Sequence[int], scores: Scores = None
    ) -> list[float]:
        return [removed] * len(layers)


@dataclass(frozen=True)
class GlobalScore(Allocation):
    """Scores compete across layers; every layer keeps what it must, and at least `floor` experts.

    Scores are divided by their layer's sum first, as SEER-MoE and M-SMoE rank shares; ties are
    dealt out evenly.
    """

    compares: ClassVar[bool] = True

    floor: int = 1

    def shares(
        self, layers: Layers, removed: float, least: Sequence[int], scores: Scores = None
    ) -> list[float]:
        """Return shares whose experts sum to exactly the uniform total.

        Raises:
            OutOfReach: the layers must keep more than that.
        """
        total = sum(units_kept(layer.num_experts, removed) for layer in layers)
        counts = [max(self.floor, n) for n in least]
        free = total - sum(counts)
        if free < 0:
            raise OutOfReach(
                f"allocation=global cannot keep {total} experts with at least {counts} a layer; "
                f"allowed ratios: 0 to {_highest_ratio(layers, counts):.4g}"
            )
        if scores is None:
            scores = [torch.ones(layer.num_experts) for layer in layers]
        ranked = [
            (-float(share), rank, i)
            for i, score in enumerate(scores)
            for rank, share in enumerate(_falling_shares(score))
            if rank >= counts[i]
        ]
        for _, _, i in sorted(ranked)[:free]:
            counts[i] += 1
        return shares_of(layers, counts)


@dataclass(frozen=True)
class PerLayer(Allocation):
    """An explicit list of kept experts; the budget then only says that something is removed."""

    kept: tuple[int, ...] = ()

    def shares(
        self, layers: Layers, removed: float, least: Sequence[int], scores: Scores = None
    ) -> list[float]:
        """Return the shares that leave the listed counts.

        Raises:
            InputError: the list has another length than there are layers.
            OutOfReach: a layer has fewer experts.
        """
        if len(self.kept) != len(layers):
            raise InputError(
                f"allocation.kept has {len(self.kept)} entries; the model has {len(layers)} MoE "
                "layers"
            )
        counts = [int(count) for count in self.kept]
        check_kept(layers, counts, [0] * len(layers))
        return shares_of(layers, counts)


def removed_shares(
    layers: Layers,
    budget: Budget,
    allocation: Allocation,
    least: Sequence[int] = (),
    scores: Scores = None,
) -> list[float]:
    """Return each layer's share of a budget that names one; others as for `Allocation.shares`."""
    assert budget.removed is not None  # only a skipper may be left to its own rule
    return allocation.shares(layers, budget.removed, least, scores)


def check_kept(layers: Layers, counts: Sequence[int], least: Sequence[int]) -> None:
    """Check kept counts before anything heavy.

    Raises:
        OutOfReach: a count is outside [least, E].
    """
    for layer, count, needed in zip(layers, counts, least, strict=True):
        if not needed <= count <= layer.num_experts:
            raise OutOfReach(
                f"the ratio leaves {count} of {layer.num_experts} experts in layer {layer.index}, "
                f"and at least {needed} are needed (top_k = {layer.top_k}, {layer.num_groups} "
                f"router groups); allowed ratios: 0 to {_highest_ratio([layer], [needed]):.4g}"
            )


def shares_of(layers: Layers, counts: Sequence[int]) -> list[float]:
    """Return the removed shares that leave these counts of experts."""
    return [(la.num_experts - n) / la.num_experts for n, la in zip(counts, layers, strict=True)]


def counts_of(layers: Layers, shares: Sequence[float]) -> list[int]:
    """Return the counts of experts that removed shares leave."""
    return [units_kept(la.num_experts, share) for la, share in zip(layers, shares, strict=True)]


def _falling_shares(score: Tensor) -> Tensor:
    """Return a layer's scores as shares of their sum, falling; all zero where the sum is."""
    total = score.double().sum()
    shares = score.double() / total if total > 0 else torch.zeros_like(score, dtype=torch.float64)
    return shares.sort(descending=True).values


def _highest_ratio(layers: Layers, least: Sequence[int]) -> float:
    return 1 - sum(least) / sum(layer.num_experts for layer in layers)
