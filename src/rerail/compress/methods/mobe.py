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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.compress.factoring import Factoriser
from rerail.errors import InputError
from rerail.moe.bank import BankSpec
from rerail.moe.banks.basis import mixed
from rerail.moe.layer import MoELayer
from rerail.stats.statistic import LayerStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class MoBE(Factoriser):
    """The method.

    Attributes:
        matrices: which matrix types are factorised.
        bases: m, a divisor of E; by default E / 4, or solved from the budget when rank is `full`.
        rank: `full` for r = p (the paper), or `solve` for the largest r that the budget allows.
        activation: f.
        steps, learning_rate: of Adam; patience: evaluations without progress before it stops.
        seed: unused by the deterministic start; kept out on purpose.
    """

    matrices: Literal["gate+up", "gate+up+down"] = "gate+up+down"
    bases: int | None = None
    rank: Literal["full", "solve"] = "solve"
    activation: Literal["silu", "tanh", "identity"] = "silu"
    steps: int = 1000
    learning_rate: float = 0.07
    patience: int = 5

    paper: ClassVar[str] = "arXiv 2508.05257"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        """No statistic: the fit sees weights only."""
        return ()

    def sizes(self, layer: MoELayer, budget: int) -> Mapping[str, int]:
        """Return bases m and rank r such that all factorised types fit the budget."""
        n, p, d = layer.num_experts, layer.intermediate_size, layer.hidden_size
        types = len(self.matrices.split("+"))
        per_type = (budget - (layer.expert_size() * n - types * n * p * d)) // types
        divisors = [m for m in range(n, 0, -1) if n % m == 0]
        for m in (
            [self.bases] if self.bases else divisors if self.rank == "full" else [max(1, n // 4)]
        ):
            r = p if self.rank == "full" else (per_type - n * m) // (n * p + m * d)
            r = min(r, p * n // m, d) if m in divisors else 0
            if r >= 1 and n * p * r + m * r * d + n * m <= per_type:
                return {"bases": m, "rank": r}
        kept = budget / (layer.expert_size() * n)
        least = (
            1
            - types / 3
            + types * (p * n + d + n) / (3 * n * p * d) * (p if self.rank == "full" else 1)
        )
        raise InputError(
            f"MoBE with matrices={self.matrices}, rank={self.rank}, bases={self.bases} cannot store layer "
            f"{layer.index} in {kept:.4g} of its numbers; bases must divide {n}, and ratios from 0 to about "
            f"{1 - least:.4g} can be reached"
        )

    def spec(self, layer: MoELayer, sizes: Mapping[str, int]) -> BankSpec:
        """Return the basis form."""
        names = tuple(
            f"{t}.{part}" for t in self.matrices.split("+") for part in ("A", "alpha", "B")
        )
        options = {"matrices": self.matrices, "activation": self.activation}
        return BankSpec("basis", layer.num_experts, (), dict(sizes), options, names)

    def factor(
        self, layer: MoELayer, statistics: LayerStatistics, sizes: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Fit each type; the down projection on its transpose."""
        gate, up, down = layer.stack()
        stacks = {"gate": gate, "up": up, "down": down.mT}
        tensors = {}
        for name in self.matrices.split("+"):
            a, alpha, b = self.fit(stacks[name].detach().float(), sizes["bases"], sizes["rank"])
            tensors |= {f"{name}.A": a, f"{name}.alpha": alpha, f"{name}.B": b}
        return tensors

    def fit(self, stack: Tensor, bases: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return A (E, p, r), alpha (E, m), B (m, r, d) for a stack (E, p, d) in float32."""
        sigma = stack.std().clamp(min=torch.finfo(stack.dtype).tiny)
        target = stack / sigma
        a, w, b = start(stack, bases, rank)
        free = [t.clone().requires_grad_() for t in (a, w, b)]
        adam = torch.optim.Adam(free, lr=self.learning_rate, foreach=True)
        best = (float("inf"), [t.detach().clone() for t in free])
        every, stale = max(1, self.steps // 40), 0
        for step in range(self.steps + 1):
            with torch.enable_grad():
                loss = (
                    (mixed(free[0], F.softmax(free[1], -1), free[2], self.activation) - target)
                    .square()
                    .sum()
                )
            if step % every == 0 or step == self.steps:
                progress = float(loss) < best[0] * 0.999
                stale = 0 if progress else stale + 1
                best = min(
                    best, (float(loss), [t.detach().clone() for t in free]), key=lambda x: x[0]
                )
                if stale >= self.patience:
                    break
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
        a, w, b = best[1]
        return a * sigma, F.softmax(w, -1), b


def start(stack: Tensor, bases: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD start: A (E, p, r), w (E, m) one-hot, B (m, r, d)."""
    n, p, d = stack.shape
    u, s, vt = torch.linalg.svd(stack.reshape(bases, n // bases * p, d), full_matrices=False)
    a = (u[..., :rank] * s[:, None, :rank]).reshape(n, p, rank)
    w = F.one_hot(torch.arange(n) // (n // bases), bases).to(stack.dtype)
    return a.contiguous(), w, vt[:, :rank].contiguous()
