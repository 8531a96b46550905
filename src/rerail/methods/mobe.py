"""MoBE: mixture of basis experts (arXiv 2508.05257, section 3). Needs no data.

Every expert matrix of one type, W_i (p x d), is approximated by

    W_i ~ A_i f( sum_j alpha_ij B_j ),    alpha_i = softmax(w_i)

with A_i (p, r) its own, the m bases B_j (r, d) shared in the layer and f = SiLU (or tanh). The fit
minimises sum_i || W_i / sigma - A_i f(.) ||^2 with Adam, sigma the standard deviation over all
experts of the type (the mean is dropped); sigma is folded into A afterwards. It starts from the SVD
of m row-stacked blocks of E / m experts (A = U_r S_r, B_j = V_r^T, w one-hot with value 1, so alpha
is not one-hot): a start no better than zero, so the fit always runs; its best step is kept.

Oriented p x d = I x H; `down` is factorised on its transpose, the basis on the hidden axis.
Stored numbers of a matrix type: E p r + m r d + E m. The paper and its code factorise gate and up
only, with r = p, so that m is the one knob (`rank=full`); there a layer cannot go below 7/12 of its
size at p < d/2. Here a free rank is solved from the budget and `down` may join (`matrices`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.compress.solvers.basis_loss import basis_loss
from rerail.compress.solvers.fitting import best_by_adam
from rerail.compress.templates.factoriser import Factoriser, Integers
from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.statistics.statistic import LayerStatistics


@dataclass(frozen=True, kw_only=True)
class MoBE(Factoriser):
    """Fits a few bases, and mixtures of them, to all matrices of a type.

    Attributes:
        matrices: which matrix types are factorised.
        bases: m, a divisor of E; by default about E / 4, or solved from the budget if rank=full.
        rank: `full` for r = min(p, d) (the paper), `solve` for the largest r in the budget.
        activation: f.
        steps, learning_rate: of Adam; patience: looks (40 a fit) without 0.1 % less loss.
    """

    matrices: Literal["gate+up", "gate+up+down"] = "gate+up+down"
    bases: int | None = None
    rank: Literal["full", "solve"] = "solve"
    activation: Literal["silu", "tanh", "identity"] = "silu"
    steps: int = 1000
    learning_rate: float = 0.07
    patience: int = 5

    paper: ClassVar[str] = "arXiv 2508.05257"

    def sizes(self, layer: MoELayer, max_numbers: int, statistics: object = None) -> Integers:
        """Return bases m and rank r such that all factorised types fit."""
        n, p, d, _ = layer.dims
        types, dense = len(self.matrices.split("+")), layer.expert_size * n
        untouched = dense - types * n * p * d
        divisors = [m for m in range(n, 0, -1) if n % m == 0]
        quarter = next(m for m in divisors if m <= max(1, n // 4))
        free = divisors if self.rank == "full" else [quarter]
        for m in [self.bases] if self.bases else free:
            left = (max_numbers - untouched) // types - n * m
            fits, cap = left // (n * p + m * d), min(n // m * p, d)
            r = min(fits, cap) if self.rank == "solve" else min(p, d)
            if m in divisors and 1 <= r <= fits:
                return {"bases": m, "rank": r}
        m, r = self.bases or free[-1], 1 if self.rank == "solve" else min(p, d)
        least = untouched + types * (n * p * r + m * r * d + n * m)
        raise OutOfReach(
            f"MoBE with matrices={self.matrices}, rank={self.rank}, bases={self.bases} cannot "
            f"store layer {layer.index} in {max_numbers / dense:.4g} of its numbers; bases must "
            f"divide {n}, and ratios from 0 to {max(0.0, 1 - least / dense):.4g} can be reached"
        )

    def spec(self, layer: MoELayer, sizes: Integers) -> BankSpec:
        options = {"matrices": self.matrices, "activation": self.activation}
        return BankSpec("basis", layer.num_experts, (), dict(sizes), options)

    def factor(
        self, layer: MoELayer, statistics: LayerStatistics, sizes: Integers
    ) -> dict[str, Tensor]:
        gate, up, down = layer.stack()
        stacks, tensors = {"gate": gate, "up": up, "down": down.mT}, dict[str, Tensor]()
        for name in self.matrices.split("+"):
            a, alpha, b = self.fit(stacks[name].float(), sizes["bases"], sizes["rank"])
            tensors |= {f"{name}.A": a, f"{name}.alpha": alpha, f"{name}.B": b}
        return tensors

    def fit(self, stack: Tensor, bases: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return A (E, p, r), alpha (E, m), B (m, r, d) for a stack (E, p, d) in float32."""
        sigma = stack.std().clamp(min=torch.finfo(stack.dtype).tiny)
        target = stack / sigma

        def loss(a: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return basis_loss(a, F.softmax(w, -1), b, target, self.activation)

        first = start(stack, bases, rank)
        a, w, b = best_by_adam(first, loss, self.steps, self.learning_rate, self.patience)
        return a * sigma, F.softmax(w, -1), b


def start(stack: Tensor, bases: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD start: A (E, p, r), w (E, m) one-hot, B (m, r, d)."""
    n, p, d = stack.shape
    u, s, vt = torch.linalg.svd(stack.reshape(bases, n // bases * p, d), full_matrices=False)
    sign = vt.gather(-1, vt.abs().argmax(-1, keepdim=True)).sign()
    a = (u * (s.unsqueeze(-1) * sign).mT)[..., :rank].reshape(n, p, rank)
    w = F.one_hot(torch.arange(n, device=stack.device) // (n // bases), bases).to(stack.dtype)
    return a.contiguous(), w, (vt * sign)[:, :rank].contiguous()
