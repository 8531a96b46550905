"""Sub-MoE: experts of like outputs share a subspace (arXiv 2506.23266, AAAI 2026).

1. s_ij = (1/n) sum_t cos(Y_i[t], Y_j[t]) (eq. 2) of all experts' outputs Y_e (n, H), ungated, on n
   sampled inputs; k-means++, Lloyd, the least J of `restarts`. The paper mixes cosines (assignment)
   with Euclidean distances (objective, eq. 3). Ours: `kernel=cosine` is Euclidean k-means of rows
   brought to length 1, `kernel=output` that of the outputs as they are.
2. Two consecutive layers share what they store (`window`). How is not printed; ours: the k_1 and
   k_2 of sum 2 k with the least J_1(k_1) / tr S_1 + J_2(k_2) / tr S_2. An allocation other than
   uniform decides instead. Experts of different layers are never merged.
3. [W_1 | ... | W_m] = U Sigma [V_1 | ... | V_m]^T, V = sum f_e V_e / sum f_e (f_e the usage count),
   W = U Sigma V^T. At full rank that *is* sum f_e W_e / sum f_e, whichever way matrices are
   stacked, and at rank r it is U_r U_r^T times that. So experts are averaged, and projected where
   `rank` or `energy` says so. `members` is the paper's ablation: `frequency`, `average` (f = 1),
   or `drop` (V of the most used member alone).
4. The router is not described: ours `remap`. There is no public code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Layers, Statistics
from rerail.compress.solvers import grouping, kernel_kmeans, subspace, windows
from rerail.compress.templates.merger import Merger
from rerail.errors import InputError
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Budget
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, Statistic
from rerail.statistics.token_sample import TokenSample


@dataclass(frozen=True, kw_only=True)
class SubMoE(Merger):
    """Merges clusters of experts whose outputs point the same way.

    Attributes:
        kernel, window, members: see above.
        rank: of every merged matrix; None for all, or what `energy` asks for.
        energy: share of the sum of sigma^2 that a merged matrix keeps.
        rows: n, how many inputs are sampled in each layer.
        restarts, seed: of k-means.
    """

    kernel: Literal["cosine", "output"] = "cosine"
    window: int = 2
    members: Literal["frequency", "average", "drop"] = "frequency"
    rank: int | None = None
    energy: float = 1.0
    rows: int = 2048
    restarts: int = 10
    seed: int = 0

    paper: ClassVar[str] = "arXiv 2506.23266"

    def __post_init__(self) -> None:
        for name in ("rank", "rows", "restarts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"compressor.{name}={value} must be at least 1")
        if not 0 < self.energy <= 1:
            raise InputError(f"compressor.energy={self.energy} is outside (0, 1]")

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return (TokenSample(self.rows), Count())

    def clusters(
        self, layer: MoELayer, statistics: LayerStatistics, counts: Sequence[int]
    ) -> list[tuple[Tensor, float]]:
        """Return labels (E,) and J(k) / tr S for each k of `counts`."""
        inputs = TokenSample.hidden(statistics[TokenSample(self.rows)])
        gram = kernel_kmeans.output_gram(layer, inputs, unit=self.kernel == "cosine")
        generator = torch.Generator().manual_seed(self.seed)
        orders = kernel_kmeans.seed_orders(gram, self.restarts, generator)
        return [kernel_kmeans.clustered(gram, orders, count) for count in counts]

    def group(self, layer: MoELayer, statistics: LayerStatistics, num_stored: int) -> Tensor:
        return self.clusters(layer, statistics, [num_stored])[0][0]

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Return the number of groups in each layer, dealt anew inside each window."""
        counts = super().allocate(layers, statistics, budget, allocation)
        spans = windows.windows_of(layers, self.window if allocation.uniform else 1)
        if statistics is None:
            return counts

        def losses(i: int, ks: Sequence[int]) -> list[float]:
            view = statistics.of(layers[i], self.requires)
            return [loss for _, loss in self.clusters(layers[i], view, ks)]

        least = [self.least_experts(layer) for layer in layers]
        return windows.dealt(spans, counts, least, [la.num_experts for la in layers], losses)

    def member_weights(
        self, layer: MoELayer, statistics: LayerStatistics, labels: Tensor
    ) -> Tensor:
        used = self.usage(statistics)
        if self.members == "frequency":
            return used
        only = torch.full_like(used, int(self.members == "average"))
        only[list(self.centroids(layer, statistics, labels))] = 1
        return only

    def solve(
        self, layer: MoELayer, statistics: LayerStatistics, labels: Tensor
    ) -> tuple[grouping.Fused, tuple[str, ...]] | None:
        if self.rank is None and self.energy == 1:
            return None
        weights = self.member_weights(layer, statistics, labels)
        merged = grouping.merged_experts(layer, labels, weights)
        means = layer.layout.unpack(merged["gate_up_proj"], merged["down_proj"])
        for mean, stack in zip(means, layer.stack(), strict=True):
            # parts of the fused tensors are written in place
            subspace.project_(mean, stack, labels, self.rank, self.energy)
        return merged, ()
