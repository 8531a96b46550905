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
   a_e share of outliers in the inputs (see `OutlierShare`).

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

from rerail.compress.base import Layers, Statistics
from rerail.compress.solvers import whitening
from rerail.compress.solvers.blending import used
from rerail.compress.solvers.ranks import Ranks
from rerail.compress.templates.factoriser import Factoriser, Integers
from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation, removed_shares
from rerail.plan.budget import Budget, dense_numbers, numbers_kept
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, RoutedStatistic, RoutedTokens, Statistic


@dataclass(frozen=True)
class OutlierShare(RoutedStatistic):
    """sum over X_e of the share of entries with |x_j| > threshold * mean_j |x_j|. float64 (E,).

    The replica takes the mean over all activations of an expert; the token's own needs one pass.
    """

    axes = "E"

    threshold: float = 2.0

    def measure(self, tokens: RoutedTokens) -> Tensor:
        size = tokens.hidden.float().abs()
        peaks = size > self.threshold * size.mean(dim=1, keepdim=True)
        share = peaks.double().mean(dim=1, keepdim=True)
        return tokens.sum_by_expert(share.expand(tokens.index.shape))


@dataclass(frozen=True, kw_only=True)
class MoESVD(Factoriser):
    """Stores shared rows, and columns of each expert or of few.

    Attributes:
        rows, refit_u, distinct, dense_layers: see above.
        whiten: weigh errors by the text; false is plain SVD, without data.
        shrink, ridge: how moments are made safe, see `whitening.Moments`.
    """

    rows: Literal["frequent", "stack"] = "frequent"
    refit_u: bool = False
    distinct: int | None = None
    dense_layers: int = 0
    whiten: bool = True
    shrink: float = 0.25
    ridge: float = 1e-6

    paper: ClassVar[str] = "OpenReview acJ3vdFljk"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        outliers = (OutlierShare(),) if self.dense_layers else ()
        return tuple(dict.fromkeys((Count(), *whitening.moment_statistics(self.whiten), *outliers)))

    def ranks(self, layer: MoELayer) -> tuple[int, dict[str, Ranks]]:
        """Return one rank a matrix type."""
        n, p, d, _ = layer.dims
        k = min(self.distinct or n, n)
        fixed = dense_numbers(layer) - 3 * n * p * d + (3 * n * k if self.distinct else 0)
        sides = {"gate": (p, d), "up": (p, d), "down": (d, p)}
        cap = {m: inner if self.rows == "stack" else min(p, d) for m, (_, inner) in sides.items()}
        return fixed, {m: Ranks(k * out + i, cap[m], None) for m, (out, i) in sides.items()}

    def spec(self, layer: MoELayer, sizes: Integers) -> BankSpec:
        few = {"distinct": min(self.distinct, layer.num_experts)} if self.distinct else {}
        return BankSpec("low_rank", layer.num_experts, (), {**sizes, **few}, {"rows": "shared"})

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Return the numbers that each layer may store; all of them for the most sensitive."""
        shares, order = removed_shares(layers, budget, allocation), list(range(len(layers)))
        pairs = zip(layers, shares, strict=True)
        counts = [numbers_kept(dense_numbers(layer), share) for layer, share in pairs]
        if self.dense_layers and statistics is not None:  # else which ones is not known yet
            views = [statistics.of(layer, self.requires) for layer in layers]
            high = [-sensitivity(layer, view) for layer, view in zip(layers, views, strict=True)]
            order.sort(key=high.__getitem__)
        spared = spare(layers, counts, order[: self.dense_layers])
        return [self.reached(layer, count) for layer, count in zip(layers, spared, strict=True)]

    def factor(
        self, layer: MoELayer, statistics: LayerStatistics, sizes: Integers
    ) -> dict[str, Tensor]:
        count = statistics[Count()]
        moments = whitening.layer_moments(layer, statistics, self.whiten, self.shrink, self.ridge)
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


def spare(layers: Layers, counts: Sequence[int], dense: Sequence[int]) -> list[int]:
    """Return counts where some layers (by position) keep all numbers and the others pay for it.

    Raises:
        OutOfReach: nothing would be left for the others.
    """
    whole = {i: dense_numbers(layers[i]) for i in dense}
    rest = sum(n for i, n in enumerate(counts) if i not in whole)
    left = sum(counts) - sum(whole.values())
    if left <= 0:
        share = 1 - sum(whole.values()) / sum(dense_numbers(layer) for layer in layers)
        raise OutOfReach(
            f"{len(whole)} of {len(layers)} layers cannot stay dense at this ratio; ratios from 0 "
            f"to less than {share:.4g} can be reached"
        )
    return [whole[i] if i in whole else n * left // rest for i, n in enumerate(counts)]
