"""Mergers: experts share one weighted mean per group. One function is open: `group`."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerail.compress.compressor import Compressor, ScopePlan
from rerail.moe.bank import BankSpec, Member
from rerail.moe.layer import MoELayer
from rerail.plan.allocation import Allocation, check_kept
from rerail.plan.plan import LayerPlan
from rerail.plan.ratio import Ratio
from rerail.stats.statistic import LayerStatistics, StatisticSet


@dataclass(frozen=True, kw_only=True)
class Merger(Compressor):
    """Groups the experts of a layer and stores one merged expert a group; a share counts groups.

    The router keeps its E rows (`remap`): two chosen slots of one group add their gate weights.
    """

    paradigm: ClassVar[str] = "merging"

    @abstractmethod
    def group(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Tensor:
        """Return int64 labels (E,) in 0..count-1, every label used."""

    @abstractmethod
    def weights(self, statistics: LayerStatistics) -> Tensor:
        """Return non-negative merge weights (E,); they are normalised inside each group."""

    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """At least one group a layer; the router keeps all rows, so top_k is no bound."""
        even, least = [torch.ones(layer.num_experts) for layer in layers], [1] * len(layers)
        check_kept(layers, allocation.keep(layers, ratio, even, least), least)

    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Ratio,
        allocation: Allocation,
    ) -> list[int]:
        """Return the number of groups in each layer."""
        scores = [self.weights(statistics.of(layer, self.requires)).double() for layer in layers]
        return allocation.keep(layers, ratio, scores, [1] * len(layers))

    def plan_scope(
        self,
        layers: Sequence[MoELayer],
        statistics: Sequence[LayerStatistics],
        shares: Sequence[int],
    ) -> ScopePlan:
        """Group each layer, and say which weighted sum each group stores."""
        parts = []
        for layer, held, share in zip(layers, statistics, shares, strict=True):
            labels = self.group(layer, held, share)
            members = group_members(layer.index, labels, self.weights(held))
            spec = BankSpec("dense", share, members)
            slots = tuple(int(label) for label in labels)
            everyone = tuple(range(layer.num_experts))
            parts.append(LayerPlan(layer.index, everyone, slots, "untouched", spec))
        return ScopePlan(tuple(parts), {})


def group_members(layer: int, labels: Tensor, weights: Tensor) -> tuple[tuple[Member, ...], ...]:
    """Return the members of each label, weights normalised; a group without weight is averaged."""
    groups = []
    for label in range(int(labels.max()) + 1):
        experts = torch.nonzero(labels == label).flatten()
        share = weights[experts].double()
        share = torch.ones_like(share) if share.sum() == 0 else share
        share = share / share.sum()
        pairs = zip(experts.tolist(), share.tolist(), strict=True)
        groups.append(tuple((layer, expert, weight) for expert, weight in pairs))
    return tuple(groups)
