"""Allocators: how layers share what a ratio leaves."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerail.errors import InputError, OutOfReach
from rerail.moe.model import MoELayer
from rerail.plan.budget import Ratio


class Allocation(ABC):
    """Says how many experts each layer keeps.

    Attributes:
        fixed: whether the counts are known before any score.
    """

    fixed: ClassVar[bool] = True

    @abstractmethod
    def keep(
        self,
        layers: Sequence[MoELayer],
        ratio: Ratio,
        scores: Sequence[Tensor],
        least: Sequence[int],
    ) -> list[int]:
        """Return the kept count of each layer.

        Args:
            layers: the layers that are compressed.
            ratio: the removed share.
            scores: one (E,) tensor a layer, higher means keep.
            least: how many each layer must keep.
        """


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every layer keeps the same share."""

    def keep(
        self,
        layers: Sequence[MoELayer],
        ratio: Ratio,
        scores: Sequence[Tensor],
        least: Sequence[int],
    ) -> list[int]:
        """Return E - int(E * ratio) for each layer."""
        return [layer.num_experts - ratio.experts_removed(layer) for layer in layers]


@dataclass(frozen=True)
class GlobalScore(Allocation):
    """Scores compete across layers; every layer keeps what it must, and at least `floor`.

    Scores are divided by their layer's sum first, as SEER-MoE and M-SMoE rank shares; ties are
    dealt out evenly.
    """

    fixed: ClassVar[bool] = False

    floor: int = 1

    def keep(
        self,
        layers: Sequence[MoELayer],
        ratio: Ratio,
        scores: Sequence[Tensor],
        least: Sequence[int],
    ) -> list[int]:
        """Return counts that sum to exactly the uniform total."""
        total = sum(Uniform().keep(layers, ratio, scores, least))
        counts = [max(self.floor, n) for n in least]
        free = total - sum(counts)
        if free < 0:
            raise OutOfReach(
                f"allocation=global cannot keep {total} experts with at least {counts} a layer; "
                f"allowed ratios: 0 to {_reach(layers, counts):.4g}"
            )
        ranked = [
            (-float(share), rank, i)
            for i, score in enumerate(scores)
            for rank, share in enumerate(_shares(score))
            if rank >= counts[i]
        ]
        for _, _, i in sorted(ranked)[:free]:
            counts[i] += 1
        return counts


def _shares(score: Tensor) -> Tensor:
    """Return a layer's scores as shares of their sum, falling; all zero where the sum is."""
    total = score.double().sum()
    shares = score.double() / total if total > 0 else torch.zeros_like(score, dtype=torch.float64)
    return shares.sort(descending=True).values


@dataclass(frozen=True)
class PerLayer(Allocation):
    """An explicit list of kept counts; the ratio then only says that something is removed."""

    kept: tuple[int, ...] = ()

    def keep(
        self,
        layers: Sequence[MoELayer],
        ratio: Ratio,
        scores: Sequence[Tensor],
        least: Sequence[int],
    ) -> list[int]:
        """Return the list as given."""
        if len(self.kept) != len(layers):
            raise InputError(
                f"allocation.kept has {len(self.kept)} entries; the model has {len(layers)} MoE "
                "layers"
            )
        return [int(count) for count in self.kept]


def check_kept(layers: Sequence[MoELayer], counts: Sequence[int], least: Sequence[int]) -> None:
    """Check kept counts before anything heavy.

    Raises:
        OutOfReach: a count is outside [least, E].
    """
    for layer, count, needed in zip(layers, counts, least, strict=True):
        if not needed <= count <= layer.num_experts:
            raise OutOfReach(
                f"the ratio leaves {count} of {layer.num_experts} experts in layer {layer.index}, "
                f"and at least {needed} are needed (top_k = {layer.top_k}, {layer.num_groups} "
                f"router groups); allowed ratios: 0 to {_reach([layer], [needed]):.4g}"
            )


def _reach(layers: Sequence[MoELayer], least: Sequence[int]) -> float:
    return 1 - sum(least) / sum(layer.num_experts for layer in layers)
