"""MoE-SVD: whitened SVD of experts that share V and trim U (PMLR 267:35209, OpenReview acJ3vdFljk).

Per layer and matrix type, W_e L_e = P_e S_e Q_e^T with L_e L_e^T = C_e, the moment of what e sees:

1. V (r, in), shared: Q^T L^-1 of the expert with the most tokens (`rows=frequent`).
2. U_e = P_e S_e (out, r), each expert's own. The columns of one SVD do not belong to the rows of
   another, so this is no least-squares answer; `refit_u` (ours) takes W_e C_e V^T (V C_e V^T)^+.
   `rows=stack` (ours, implies it) takes V from the SVD of all experts stacked, weighted by use.
3. `distinct` = k: only the k most used U are stored; expert i answers with the mean of those among
   them that are used at least as much as i, weighted by use. With `refit_u` (ours): the k columns
   and the weights whose mixtures come closest to all U_i.
4. `dense_layers`: so many layers with the highest S = sum_e f_e r_e a_e stay as they are and the
   others pay for them: f_e share of tokens, r_e = #{s >= 0.01 s_max} averaged over the matrices,
   a_e share of outliers in the inputs (`OutlierShare`).

Stored: V shared r in + E r out; trimmed r in + k r out + E k. The paper's equations were not seen:
the steps are its pseudocode's, the details of 3 and 4 those of an unofficial replica, which keeps
k = 2, multiplies by L^T instead of L (not followed), does not norm the weights of 3 and leaves
layers with S > 50 dense; which are for a given ratio is not said, hence a number of them here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.solvers import whitening
from rerail.compress.solvers.blending import used
from rerail.compress.templates.factoring import (
    Integers,
    RankFactoriser,
    Ranks,
    dense_numbers,
    spare,
)
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Ratio
from rerail.statistics.routed import Count
from rerail.statistics.statistic import (
    LayerStatistics,
    RoutedStatistic,
    RoutedTokens,
    Statistic,
    StatisticSet,
)


@dataclass(frozen=True)
class OutlierShare(RoutedStatistic):
    """sum over X_e of the share of entries with |x_j| > threshold * mean_j |x_j|. float64 (E,).

    MoE-SVD takes the mean over all activations of an expert; here it is the token's own, so that
    one pass suffices and batches do not matter.
    """

    axes = "E"

    threshold: float = 2.0

    def measure(self, tokens: RoutedTokens) -> Tensor:
        size = tokens.hidden.float().abs()
        peaks = size > self.threshold * size.mean(dim=1, keepdim=True)
        share = peaks.double().mean(dim=1, keepdim=True)
        return tokens.sum_by_expert(share.expand(tokens.index.shape))


@dataclass(frozen=True, kw_only=True)
class MoESVD(RankFactoriser):
    """The method; attributes as above."""

    rows: Literal["frequent", "stack"] = "frequent"
    refit_u: bool = False
    distinct: int | None = None
    dense_layers: int = 0

    paper: ClassVar[str] = "OpenReview acJ3vdFljk"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        """Counts, moments, and outliers where layers are chosen."""
        outliers = (OutlierShare(),) if self.dense_layers else ()
        return tuple(dict.fromkeys((Count(), *self.moments_required, *outliers)))

    def ranks(self, layer: MoELayer) -> tuple[int, dict[str, Ranks]]:
        """Return one rank a matrix type."""
        n, p, d, _ = layer.dims
        k = min(self.distinct or n, n)
        fixed = dense_numbers(layer) - 3 * n * p * d + (3 * n * k if self.distinct else 0)
        sides = {"gate": (p, d), "up": (p, d), "down": (d, p)}
        cap = {m: inner if self.rows == "stack" else min(p, d) for m, (_, inner) in sides.items()}
        return fixed, {m: Ranks(k * out + i, cap[m], None) for m, (out, i) in sides.items()}

    def spec(self, layer: MoELayer, sizes: Integers) -> BankSpec:
        """Return the low-rank form with shared rows."""
        few = {"distinct": min(self.distinct, layer.num_experts)} if self.distinct else {}
        return BankSpec("low_rank", layer.num_experts, (), {**sizes, **few}, {"rows": "shared"})

    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """Find ranks for the layers that change; which ones they are is not known yet."""
        budgets, first = self.budgets(layers, ratio, allocation), range(self.dense_layers)
        self.check_budgets(layers, spare(layers, budgets, first))

    def allocate(
        self, layers: Sequence[MoELayer], held: StatisticSet, ratio: Ratio, allocation: Allocation
    ) -> list[int]:
        """Return the numbers that each layer may store; all of them for the most sensitive."""
        budgets, order = self.budgets(layers, ratio, allocation), list(range(len(layers)))
        if self.dense_layers:
            found = [sensitivity(layer, held.of(layer, self.requires)) for layer in layers]
            order.sort(key=lambda i: -found[i])
        return spare(layers, budgets, order[: self.dense_layers])

    def factor(
        self, layer: MoELayer, statistics: LayerStatistics, sizes: Integers
    ) -> dict[str, Tensor]:
        """Solve the shared rows, then the columns."""
        count, moments = statistics[Count()], self.moments(layer, statistics)
        refit, tensors = self.refit_u or self.rows == "stack", dict[str, Tensor]()
        for name, stack in layer.stack()._asdict().items():
            v = self.shared(stack, moments[name], count, sizes[name])
            u = (whitening.refitted if refit else whitening.own_columns)(stack, v, moments[name])
            parts, wide = {"U": u, "V": v}, torch.promote_types(stack.dtype, torch.float32)
            if self.distinct:
                trim = whitening.mixtures if refit else whitening.most_used
                parts["U"], parts["mix"] = trim(u, count, min(self.distinct, len(stack)))
            tensors |= {f"{name}.{part}": t.to(wide) for part, t in parts.items()}
        return tensors

    def shared(self, stack: Tensor, moments: whitening.Moments, count: Tensor, rank: int) -> Tensor:
        """Return V (r, in)."""
        if self.rows == "stack":
            return whitening.stack_rows(stack, used(count), moments.layer(stack.device), rank)
        e = int(count.argmax())
        values, _, rows = whitening.principal(stack[e].double(), moments.of(e, stack.device))
        return whitening.normed(values, rows)[:rank]


def sensitivity(layer: MoELayer, statistics: LayerStatistics) -> float:
    """Return S = sum_e f_e r_e a_e."""
    outliers, total = statistics[OutlierShare()], int(statistics[Count()].sum())
    spectra = [torch.linalg.svdvals(stack.float()).cpu() for stack in layer.stack()]
    ranks = sum((s >= 0.01 * s[:, :1]).double().sum(dim=1) / 3 for s in spectra)
    return float((outliers * ranks).sum()) / max(total, 1)
