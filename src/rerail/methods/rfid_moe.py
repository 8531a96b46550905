"""RFID-MoE: bases for groups of experts of similar use (arXiv 2602.09316).

Per layer, for gate and up; down stays as it is:

1. Experts, the most used first, are cut into groups g of `group_size`.
2. R_g = exp(entropy) of the squared singular values of the group's matrices, one below the other;
   E_g = R_g / sum R, F_g the group's share of tokens, C_g = xi E_g + (1 - xi) F_g.
3. Ranks K_g ~ C_g. The paper rounds down; here (ours) gate and up share the remainders out too.
4. W'_i = A_i f(sum_j alpha_ij B_gj), A_i (I, K_g) its own, B_gj (K_g, H) the m=`bases` of the group
   (how many is not said: 1 is ours), fitted group by group as in MoBE.
5. `residual=hashed`: W'_i + unvec(P eta_i), eta_i = P^T vec(W_i - W'_i), of s = share * IH numbers.
   P puts each entry into one of s buckets, so scaled that P^T P = 1: the squared error falls by
   ||eta_i||^2, by about `share` where a residual has no structure. The paper's P is a group's own;
   here (ours) one from `seed` serves all, and buckets are of even size.

Numbers: 2 sum_g K_g (k_g I + m H) + 2 E s (+ 2 E m for m > 1) + E HI of down, a third of a layer.
The paper's "60 %" is probably what stays of gate and up.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rerail.compress.solvers.bases import Fit, by_use, fit_groups, group_ranks, group_scores
from rerail.compress.solvers.blending import used
from rerail.compress.templates.factoriser import Factoriser, Factors, Integers
from rerail.experts.base import BankSpec
from rerail.experts.grouped_basis import in_buckets, num_buckets
from rerail.moe.model import MoELayer
from rerail.plan.budget import dense_numbers
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class RFIDMoE(Factoriser):
    """Fits bases to groups of experts, and a residual of few numbers.

    Attributes:
        group_size, xi, bases, residual, share, seed: see above; the others: of the fit, as MoBE's.
    """

    group_size: int = 4
    xi: float = 0.8
    bases: int = 1
    residual: Literal["hashed", "none"] = "hashed"
    share: float = 0.03
    seed: int = 0
    activation: Literal["silu", "tanh", "identity"] = "silu"
    steps: int = 1000
    learning_rate: float = 0.07
    patience: int = 5

    paper: ClassVar[str] = "arXiv 2602.09316"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return (Count(),)

    def sizes(
        self, layer: MoELayer, max_numbers: int, statistics: LayerStatistics | None = None
    ) -> Integers:
        """Return groups and ranks; without statistics as if all groups had the same score."""
        (n, p, d, _), m = layer.dims, self.bases
        count = torch.ones(n) if statistics is None else statistics[Count()]
        groups, scores = by_use(count, self.group_size), None
        if statistics is not None:
            pair, share = layer.stack()[:2], used(count)
            scores = torch.cat([group_scores(w, groups, share, self.xi) for w in pair])
        buckets = num_buckets(self.share if self.residual == "hashed" else 0.0, p * d)
        fixed = dense_numbers(layer) - 2 * n * (p * d - buckets - (m if m > 1 else 0))
        ranks = group_ranks(layer, max_numbers, fixed, groups, m, scores)
        ranks["groups"] = tuple(groups.tolist())
        return {**ranks, "bases": m, "buckets": buckets, "seed": self.seed}

    def spec(self, layer: MoELayer, sizes: Integers) -> BankSpec:
        options = {"activation": self.activation}
        return BankSpec("grouped_basis", layer.num_experts, (), dict(sizes), options)

    def factor(self, layer: MoELayer, statistics: LayerStatistics, sizes: Integers) -> Factors:
        fit = Fit(self.activation, self.steps, self.learning_rate, self.patience)
        tensors = Factors()
        for name, stack in zip(("gate", "up"), layer.stack()[:2], strict=True):
            wide = stack.float()
            parts, made = fit_groups(wide, sizes["groups"], sizes[name], sizes["bases"], fit)
            if sizes["buckets"]:
                parts["eta"] = in_buckets(wide - made, sizes["buckets"], sizes["seed"])
            tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        return tensors
