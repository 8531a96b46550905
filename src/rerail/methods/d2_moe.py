"""D2-MoE: a base that the layer's experts share, plus whitened low-rank deltas (arXiv 2502.17298).

Per layer and matrix type, with W_i (out, in), f_i the share of tokens and F_i (out, in) the
diagonal Fisher information (sums over sequences of squared gradients of the next-token loss):

    W_b = sum_i f_i F_i * W_i / sum_i f_i F_i            (elementwise; `weights=fisher`)
    W_i ~ W_b + U_i V_i,   the best factors of W_i - W_b against the moment C_i (see `whitening`).

The factor f_i is in the code only: `weights=fisher_only` is the paper's text; `frequency` and
`mean` use no gradients. Where no expert has any, the code divides 0 by 0; here the plain mean is
taken. The code's loss is of the token after the next (it shifts twice), its gradients are of whole
batches; here the loss is the true one, a sequence at a time.

`rows=shared` stores one V (r, in) for the layer, from the stack of all deltas, weighted by f_i and
whitened by the layer's moment (the code averages Cholesky factors), with U_i its least-squares
answer. Left out: sharing U too, regmean and ties bases, permuted channels, the code's absolute
floor of eigenvalues (1e-5) and its bf16 factors.

The paper prunes channels of the base at run time by a probe of the batch; nothing less is stored.
`base_prune` (ours, static) drops int(share * I) channels for all experts before anything is solved,
those of least s_j = sum_i f_i ||h_ij||^2 ||down_i[:, j]||^2. Stored for I' channels: 3 I' H + sum
of ranks * (I' + H); shared rows: r in + E r out. The code bisects its rank to 1e-4 of the whole
model; here ranks are solved in integers from the layer's budget.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.solvers import whitening
from rerail.compress.solvers.blending import blended, by_matrix, narrowed, used
from rerail.compress.solvers.ranks import Ranks
from rerail.compress.templates.factoriser import Factoriser, Integers
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.budget import dense_numbers
from rerail.statistics.backward_pass import WEIGHTS
from rerail.statistics.moments import MiddleMoment
from rerail.statistics.routed import Count
from rerail.statistics.statistic import BackwardStatistic, LayerStatistics, Statistic


@dataclass(frozen=True)
class Fisher(BackwardStatistic):
    """sum over sequences of (dL / dW)^2, L the sequence's mean next-token loss. float32 (E, N).

    The N numbers of a slot are its fused `gate_up_proj`, then its `down_proj`, flattened as they
    are stored; biases are left out. As big as the experts themselves, so float32. A slot that no
    token chose has zeros.
    """

    def empty(self, layer: MoELayer) -> Tensor:
        numbers = sum(layer.dims.numbers[name] for name in WEIGHTS)
        return torch.zeros(layer.num_experts, numbers)

    def update(self, state: Tensor, expert: int, name: str, gradient: Tensor) -> None:
        square = gradient.float().square().flatten().to(state.device)
        at = slice(None, len(square)) if name == WEIGHTS[0] else slice(-len(square), None)
        state[expert, at] += square


@dataclass(frozen=True, kw_only=True)
class D2MoE(Factoriser):
    """Stores a base and low-rank deltas.

    Attributes:
        weights, rows, base_prune: see above.
        whiten: weigh errors by the text; false is plain SVD, without data.
        shrink, ridge: how moments are made safe, see `whitening.Moments`.
    """

    weights: Literal["fisher", "fisher_only", "frequency", "mean"] = "fisher"
    rows: Literal["own", "shared"] = "own"
    base_prune: float = 0.0
    whiten: bool = True
    shrink: float = 0.25
    ridge: float = 1e-6

    paper: ClassVar[str] = "arXiv 2502.17298"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        counted = self.weights in ("fisher", "frequency") or self.rows == "shared"
        wanted: list[Statistic] = [Count()] if counted or self.base_prune else []
        wanted += [Fisher()] if self.weights.startswith("fisher") else []
        wanted += [MiddleMoment()] if self.base_prune else []
        return tuple(dict.fromkeys([*wanted, *whitening.moment_statistics(self.whiten)]))

    def ranks(self, layer: MoELayer) -> tuple[int, dict[str, Ranks]]:
        """Return the base's size and one rank a matrix, or a matrix type."""
        n, p, d, _ = layer.dims
        left = p - int(p * self.base_prune)
        fixed = dense_numbers(layer) - 3 * n * p * d + 3 * left * d
        sides = {"gate": (left, d), "up": (left, d), "down": (d, left)}
        if self.rows == "own":
            return fixed, {m: Ranks(left + d, min(left, d), n) for m in sides}
        return fixed, {m: Ranks(n * out + inner, inner, None) for m, (out, inner) in sides.items()}

    def sizes(
        self, layer: MoELayer, max_numbers: int, statistics: LayerStatistics | None = None
    ) -> Integers:
        """Return ranks, and the channels that stay where some go."""
        ranks = super().sizes(layer, max_numbers, statistics)
        if not self.base_prune or statistics is None:
            return ranks
        energy = statistics[MiddleMoment()].diagonal(dim1=1, dim2=2).double()
        weight = layer.stack().down.float().square().sum(dim=1).cpu().double()
        score = (used(statistics[Count()]).unsqueeze(1) * energy * weight).sum(dim=0)
        order = torch.argsort(score, descending=True, stable=True).tolist()
        left = len(order) - int(len(order) * self.base_prune)
        return {**ranks, "channels": tuple(sorted(order[:left]))}

    def spec(self, layer: MoELayer, sizes: Integers) -> BankSpec:
        return BankSpec("delta", layer.num_experts, (), dict(sizes), {"rows": self.rows})

    def factor(
        self, layer: MoELayer, statistics: LayerStatistics, sizes: Integers
    ) -> dict[str, Tensor]:
        """Solve the base, then the deltas against it."""
        stacks = layer.stack()
        moments = whitening.layer_moments(layer, statistics, self.whiten, self.shrink, self.ridge)
        fisher = self.weights.startswith("fisher")
        precision = by_matrix(layer, statistics[Fisher()]) if fisher else None
        by_use = self.weights in ("fisher", "frequency")
        share = used(statistics[Count()] if by_use else torch.zeros(layer.num_experts))
        if kept := list(sizes.get("channels", ())):
            stacks = narrowed(stacks, kept)
            precision = precision and narrowed(precision, kept)
            moments["down"] = moments["down"].sliced(kept)
        tensors: dict[str, Tensor] = {}
        for name, stack in stacks._asdict().items():
            base = blended(stack, share, precision and getattr(precision, name))
            wide = torch.promote_types(stack.dtype, torch.float32)
            delta = stack.to(wide) - base.to(wide)
            if self.rows == "own":
                u, v = whitening.low_rank(delta, moments[name], sizes[name])
            else:
                layer_moment = moments[name].layer(delta.device)
                v = whitening.stack_rows(
                    delta, used(statistics[Count()]), layer_moment, sizes[name]
                )
                u = whitening.refitted(delta, v, moments[name])
            parts = {"base": base, "U": u.to(wide), "V": v.to(wide)}
            tensors |= {f"{name}.{part}": t for part, t in parts.items()}
        return tensors
