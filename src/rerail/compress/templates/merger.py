"""Mergers: the experts of a group share one stored expert. Open: `group`.

What happens to the router is one option of every merger. For a group c, with centroid the member
that stays in name (the most used one, or the dominant expert that the group was built around):

    remap     E rows; slot e is answered by the expert of its group, so that two chosen slots of one
              group add their gate weights, which were normalised before and are not again
    centroid  the M rows of the centroids, sliced; top-k over M
    pooled    M rows W_R[c] = sum_{e in c} b_e W_R[e], b the merge weights inside the group
              (`pooling=weighted`) or equal (`pooling=mean`)

Only remap is exact for summed merging. Biases and correction biases follow the centroids' rows
under the last two. A grouped router (G groups of equal size) is safe under remap; the others need
M / G centroids in each router group, which mergers around dominant experts can choose and those
that cluster cannot: these refuse.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Compressor, Decision, Layers, Statistics
from rerail.compress.router_rows import best_slots, check_equal_groups
from rerail.compress.solvers.grouping import (
    Fused,
    group_members,
    shares_in_group,
    whole_experts,
    wide,
)
from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Budget
from rerail.plan.plan import ROWS, LayerPlan
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics


@dataclass(frozen=True, kw_only=True)
class Merger(Compressor):
    """Groups the experts of a layer and stores one merged expert a group; a count is of groups.

    Attributes:
        router: `remap`, `centroid` or `pooled`, see above.
        pooling: weights of pooled rows.
        around_dominants: whether groups are built around the `dominants`, which are then the
            centroids and can be spread evenly over the groups of a grouped router.
    """

    router: Literal["remap", "centroid", "pooled"] = "remap"
    pooling: Literal["weighted", "mean"] = "weighted"

    paradigm: ClassVar[str] = "merging"
    around_dominants: ClassVar[bool] = False

    @property
    def written_out(self) -> Literal["no", "yes", "never"]:
        return "yes" if self.router == "remap" else "no"

    @abstractmethod
    def group(self, layer: MoELayer, statistics: LayerStatistics, num_stored: int) -> Tensor:
        """Return int64 labels (E,) in 0..num_stored-1, every label used."""

    def usage(self, statistics: LayerStatistics) -> Tensor:
        """Return (E,), by which layers compete and centroids are chosen: the counts of tokens."""
        return statistics[Count()]

    def weights(self, statistics: LayerStatistics) -> Tensor:
        """Return non-negative merge weights (E,), normalised later inside each group: the usage."""
        return self.usage(statistics)

    def member_weights(
        self, layer: MoELayer, statistics: LayerStatistics, labels: Tensor
    ) -> Tensor:
        """Return the merge weights (E,) once groups are known; by default those without."""
        return self.weights(statistics)

    def solve(
        self, layer: MoELayer, statistics: LayerStatistics, labels: Tensor
    ) -> tuple[Fused, tuple[str, ...]] | None:
        """Return solved merged experts as fused tensors (M, ...), and notes for the user.

        By default None, for weighted sums. It is not asked where every group is one expert.
        """
        return None

    def dominants(
        self, layer: MoELayer, statistics: LayerStatistics, num_stored: int
    ) -> tuple[int, ...]:
        """Return the most used slots, ascending, as many in each router group as rows must stay."""
        least = 0 if self.router == "remap" else num_stored // layer.num_groups
        return best_slots(self.usage(statistics), num_stored, layer.num_groups, least)

    def centroids(
        self, layer: MoELayer, statistics: LayerStatistics, labels: Tensor
    ) -> tuple[int, ...]:
        """Return the dominants, or the most used member of each group; ties: the lower slot."""
        num_stored = int(labels.max()) + 1
        if self.around_dominants:
            return self.dominants(layer, statistics, num_stored)
        order = torch.argsort(self.usage(statistics), descending=True, stable=True)
        # the lowest place in the order of use among a group's members is its most used one
        first = torch.full((num_stored,), len(labels))
        first.scatter_reduce_(0, labels[order], torch.arange(len(labels)), "amin")
        return tuple(sorted(order[first].tolist()))

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Return the number of groups in each layer, once routers of groups are known to be safe.

        Centroids of clusters fall as the clusters will have it, so that groups become unequal.
        """
        counts = super().allocate(layers, statistics, budget, allocation)
        if self.router != "remap":
            if not self.around_dominants and any(layer.num_groups > 1 for layer in layers):
                raise OutOfReach(
                    f"{type(self).__name__} with router={self.router} cannot keep the groups of a "
                    "grouped router equal; allowed: ratios from 0 to 0, or compressor.router=remap"
                )
            check_equal_groups(layers, counts, allocation, "compressor.router=remap")
        return counts

    def least_experts(self, layer: MoELayer) -> int:
        return 1 if self.router == "remap" else layer.num_groups * layer.least_per_group

    def compared(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        return self.usage(statistics).double()

    def decide_layer(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Decision:
        labels = self.group(layer, statistics, count)
        single = count == layer.num_experts
        solution = None if single else self.solve(layer, statistics, labels)
        solved, notes = solution or ({}, ())
        if solution is None:
            weights = self.member_weights(layer, statistics, labels)
            members = group_members(layer.index, labels, weights)
            spec = BankSpec("dense", count, members)
        else:
            spec, solved = whole_experts(layer, solved)
        plan, rows = self.router_plan(layer, statistics, labels, spec)
        tensors = {name: t.cpu() for name, t in {**solved, **rows}.items()}
        return Decision(plan, tensors, notes)

    def router_plan(
        self, layer: MoELayer, statistics: LayerStatistics, labels: Tensor, spec: BankSpec
    ) -> tuple[LayerPlan, Mapping[str, Tensor]]:
        """Return the layer's plan by the router policy, and pooled rows."""
        if self.router == "remap":
            everyone, slots = tuple(range(layer.num_experts)), tuple(labels.tolist())
            return LayerPlan(layer.index, everyone, slots, "untouched", spec), {}
        kept = self.centroids(layer, statistics, labels)
        slots = tuple(labels[list(kept)].tolist())
        if self.router == "centroid":
            return LayerPlan(layer.index, kept, slots, "slice", spec), {}
        weights = self.weights(statistics)
        if self.pooling == "mean":
            weights = torch.ones_like(weights)
        pool = torch.zeros(len(kept), len(labels), dtype=torch.float64)
        pool[labels, torch.arange(len(labels))] = shares_in_group(labels, weights)
        rows = layer.router_rows.detach()
        pooled = (pool[list(slots)] @ rows.cpu().double()).to(wide(rows.dtype))
        return LayerPlan(layer.index, kept, slots, "pooled", spec), {ROWS: pooled}
