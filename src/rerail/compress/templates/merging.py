"""Mergers: the experts of a group share one stored expert. Open: `group`, or `similarity`.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Decision, LayerWise
from rerail.compress.templates.pruning import best
from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec, Member
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation, check_kept
from rerail.plan.budget import Ratio
from rerail.plan.plan import ROWS, LayerPlan
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, StatisticSet

Fused = dict[str, Tensor]
Change = Callable[[int, Fused], Fused]


@dataclass(frozen=True, kw_only=True)
class Merger(LayerWise):
    """Groups the experts of a layer and stores one merged expert a group; a share counts groups.

    Attributes:
        router: `remap`, `centroid` or `pooled`, see above.
        pooling: weights of pooled rows.
        balanced: whether the centroids can be spread evenly over the groups of a grouped router.
    """

    router: Literal["remap", "centroid", "pooled"] = "remap"
    pooling: Literal["weighted", "mean"] = "weighted"

    paradigm: ClassVar[str] = "merging"
    balanced: ClassVar[bool] = False

    @abstractmethod
    def group(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Tensor:
        """Return int64 labels (E,) in 0..count-1, every label used."""

    def usage(self, statistics: LayerStatistics) -> Tensor:
        """Return (E,), by which layers compete and centroids are chosen: the usage counts."""
        return statistics[Count()]

    def weights(self, statistics: LayerStatistics) -> Tensor:
        """Return non-negative merge weights (E,), normalised later inside each group: the usage."""
        return self.usage(statistics)

    def solve(
        self,
        layer: MoELayer,
        statistics: LayerStatistics,
        labels: Tensor,
        notes: list[str],
    ) -> Fused | None:
        """Return solved merged experts as fused tensors (M, ...); None for weighted sums.

        It is not asked where every group is one expert. What a user should know goes into `notes`.
        """
        return None

    def centroids(
        self, layer: MoELayer, statistics: LayerStatistics, labels: Tensor
    ) -> tuple[int, ...]:
        """Return the most used member of each group, ascending; ties go to the lower slot."""
        order = torch.argsort(self.usage(statistics), descending=True, stable=True)
        first = torch.full((int(labels.max()) + 1,), len(labels))
        first.scatter_reduce_(0, labels[order], torch.arange(len(labels)), "amin")
        return tuple(sorted(order[first].tolist()))

    def each(self, layer: MoELayer, count: int) -> int:
        """Return how many of `count` centroids must lie in each router group."""
        return 0 if self.router == "remap" else count // layer.num_groups

    def least(self, layer: MoELayer) -> int:
        """Return the fewest groups: one, or as many as top_k needs rows."""
        return 1 if self.router == "remap" else layer.num_groups * layer.least_per_group

    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """Check the counts before anything heavy; a grouped router needs equal shares."""
        even = [torch.ones(layer.num_experts) for layer in layers]
        least = [self.least(layer) for layer in layers]
        counts = allocation.keep(layers, ratio, even, least)
        check_kept(layers, counts, least)
        for layer, count in zip(layers, counts, strict=True):
            if self.router == "remap" or layer.num_groups == 1:
                continue
            equal = f"multiples of {layer.num_groups} rows a layer and allocation=uniform"
            allowed = equal if self.balanced else "ratios from 0 to 0"
            if not self.balanced or not allocation.fixed or count % layer.num_groups:
                raise OutOfReach(
                    f"{type(self).__name__} with router={self.router} and {allocation} cannot "
                    f"leave {count} rows to layer {layer.index}, whose router has "
                    f"{layer.num_groups} groups that must stay equal; allowed: {allowed}, or "
                    "compressor.router=remap"
                )

    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Ratio,
        allocation: Allocation,
    ) -> list[int]:
        """Return the number of groups in each layer."""
        scores = [self.usage(statistics.of(layer, self.requires)).double() for layer in layers]
        return allocation.keep(layers, ratio, scores, [self.least(layer) for layer in layers])

    def decide(self, layer: MoELayer, statistics: LayerStatistics, share: int) -> Decision:
        """Group the experts, say what each group stores, and which router rows stay."""
        labels, notes = self.group(layer, statistics, share), list[str]()
        single = share == layer.num_experts
        solved = None if single else self.solve(layer, statistics, labels, notes)
        if solved is None:
            members = group_members(layer.index, labels, self.weights(statistics))
            spec, solved = BankSpec("dense", share, members), {}
        else:
            like = expert_parameters(layer.stock())
            solved = {name: t.to(like[name].dtype) for name, t in solved.items()}
            shapes = {name: tuple(t.shape[1:]) for name, t in solved.items()}
            spec = BankSpec("merged", share, (), shapes)
        part, rows = self.form(layer, statistics, labels, spec)
        tensors = {name: t.cpu() for name, t in {**solved, **rows}.items()}
        return Decision(part, tensors, tuple(notes))

    def form(
        self, layer: MoELayer, statistics: LayerStatistics, labels: Tensor, spec: BankSpec
    ) -> tuple[LayerPlan, Mapping[str, Tensor]]:
        """Return the layer's decision by the router policy, and pooled rows."""
        if self.router == "remap":
            everyone, slots = tuple(range(layer.num_experts)), tuple(labels.tolist())
            return LayerPlan(layer.index, everyone, slots, "untouched", spec), {}
        kept = self.centroids(layer, statistics, labels)
        slots = tuple(labels[list(kept)].tolist())
        if self.router == "centroid":
            return LayerPlan(layer.index, kept, slots, "slice", spec), {}
        given = self.weights(statistics)
        share = shares_in_group(labels, torch.ones_like(given) if self.pooling == "mean" else given)
        pool = torch.zeros(len(kept), len(labels), dtype=torch.float64)
        pool[labels, torch.arange(len(labels))] = share
        held = layer.router_rows.detach()
        wide = torch.promote_types(held.dtype, torch.float32)
        rows = (pool[list(slots)] @ held.cpu().double()).to(wide)
        return LayerPlan(layer.index, kept, slots, "pooled", spec), {ROWS: rows}


class DominantMerger(Merger):
    """Builds groups around the most used experts of the layer. Open: `similarity`."""

    balanced: ClassVar[bool] = True

    @abstractmethod
    def similarity(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return (E, E), higher means more alike."""

    def dominants(
        self, layer: MoELayer, statistics: LayerStatistics, count: int
    ) -> tuple[int, ...]:
        """Return the `count` most used slots, ascending."""
        each = self.each(layer, count)
        return best(self.usage(statistics), count, layer.num_groups, each)

    def group(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Tensor:
        """Give every other expert to the dominant one that it is most alike."""
        chosen = list(self.dominants(layer, statistics, count))
        labels = self.similarity(layer, statistics)[:, chosen].argmax(dim=1)
        labels[chosen] = torch.arange(count)
        return labels

    def centroids(
        self, layer: MoELayer, statistics: LayerStatistics, labels: Tensor
    ) -> tuple[int, ...]:
        """Return the dominant experts."""
        return self.dominants(layer, statistics, int(labels.max()) + 1)


def cosine(gram: Tensor) -> Tensor:
    """Return the cosines G_ij / sqrt(G_ii G_jj) of a Gram matrix (E, E); 0 for a zero vector."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, norms.reciprocal(), 0.0)
    return gram * scale.unsqueeze(1) * scale


def weight_gram(*stacks: Tensor) -> Tensor:
    """Return the float64 Gram matrix (E, E) of experts flattened over all stacks (E, ...)."""
    flat = [stack.detach().flatten(1).to(wide(stack.dtype)) for stack in stacks]
    return torch.stack([part @ part.mT for part in flat]).sum(dim=0).cpu().double()


def shares_in_group(labels: Tensor, weights: Tensor) -> Tensor:
    """Return float64 weights (E,) that sum to 1 in each group; one without weight is averaged."""
    weights = weights.double()
    empty = torch.zeros(int(labels.max()) + 1, dtype=torch.float64)
    total = empty.index_add(0, labels, weights)
    counts = empty.index_add(0, labels, torch.ones_like(weights))
    alone = total == 0
    return torch.where(
        alone[labels], 1 / counts[labels], weights / total.masked_fill(alone, 1)[labels]
    )


def group_members(layer: int, labels: Tensor, weights: Tensor) -> tuple[tuple[Member, ...], ...]:
    """Return the members of each label with their shares."""
    groups: list[list[Member]] = [[] for _ in range(int(labels.max()) + 1)]
    share = shares_in_group(labels, weights).tolist()
    for expert, label in enumerate(labels.tolist()):
        groups[label].append((layer, expert, share[expert]))
    return tuple(tuple(group) for group in groups)


def merged_experts(
    layer: MoELayer, labels: Tensor, weights: Tensor, change: Change = lambda _, expert: expert
) -> Fused:
    """Return sum_{e in c} b_e W_e of every group as fused tensors (M, ...), in float32 or wider.

    A group of one is that expert, to the bit.

    Args:
        layer: holds the experts.
        labels: (E,).
        weights: (E,), normalised here.
        change: gives slot e's tensors another form before they are added (aligned, say).
    """
    held = {n: p.detach() for n, p in expert_parameters(layer.stock()).items()}
    count = int(labels.max()) + 1
    out = {
        n: torch.zeros(count, *p.shape[1:], dtype=wide(p.dtype), device=p.device)
        for n, p in held.items()
    }
    share, sizes = shares_in_group(labels, weights).tolist(), torch.bincount(labels).tolist()
    for e, label in enumerate(labels.tolist()):
        own = {n: p[e] for n, p in held.items()}
        for name, tensor in (own if sizes[label] == 1 else change(e, own)).items():
            out[name][label] += share[e] * tensor.to(out[name].dtype)
    return out


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
