"""TD-MoE: one whitened Tucker decomposition for all experts of a layer (OpenReview D9cnZNZfxX).

Per layer and matrix type the E matrices W_e (O, D) are a tensor T (E, O, D), so that what experts
have in common is a rank of a mode of its own. With S_D, S_O made of the moments C of what goes into
the matrices and of the gradient in what they make, both pooled over experts,

    T x2 S_O x3 S_D ~ G x1 U1 x2 U2 x3 U3,
    W'_e = (S_O^-1 U2) (sum_a U1[e, a] G_a) (S_D^-1 U3)^T,      see `tucker`.

1. S = C^power. At 1/2, ||(W_e - W'_e) S_D||^2 is the loss on the text; the paper prints -1/2, and
   its code has -1/2 for outputs and sends noise back in place of the loss. `ridge` is relative
   (ours; the code clips eigenvalues at 1e-3).
2. r1 r2 r3 + E r1 + O r2 + D r3 numbers, without E r1 at r1 = E, where U1 is folded into G; a third
   of the budget for each type. `expert_rank=full` is r1 = E (the paper on Mixtral), `search` tries
   all (on Qwen2). Of the triples that fit, `choice=energy` (ours) takes the one with the least
   discarded energy, `distance` (the code's) the one nearest to the budget, often lopsided.
3. HOSVD as in the code, then `iterations` of HOOI as in a replica.

Left out: layer shares by Fisher information; `allocation=per_layer` takes any.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from rerail.compress.solvers import tucker
from rerail.compress.solvers.ranks import check_reach
from rerail.compress.templates.factoriser import Factoriser, Factors, Integers
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.budget import dense_numbers
from rerail.statistics.statistic import LayerStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class TDMoE(Factoriser):
    """Stores a core and factors that all experts share.

    Attributes:
        whiten, whiten_output: weigh errors by what goes in, and (a backward pass) what comes out.
        power, ridge, expert_rank, choice, iterations: see above.
    """

    whiten: bool = True
    whiten_output: bool = False
    power: float = 0.5
    ridge: float = 1e-6
    expert_rank: Literal["full", "search"] = "full"
    choice: Literal["energy", "distance"] = "energy"
    iterations: int = 0

    paper: ClassVar[str] = "OpenReview D9cnZNZfxX"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return tucker.side_statistics(self.whiten, self.whiten_output)

    def spec(self, layer: MoELayer, sizes: Integers) -> BankSpec:
        return BankSpec("tucker", layer.num_experts, (), dict(sizes))

    def sizes(self, layer: MoELayer, max_numbers: int, statistics: object = None) -> Integers:
        """Return the triples nearest to the budget: no spectrum is known yet."""
        n, p, d, _ = layer.dims
        fixed = dense_numbers(layer) - 3 * n * p * d
        full = fixed + 3 * (n * p * d + p * p + d * d)
        check_reach(layer, max_numbers, fixed + 3 * (n + p + d), full)
        each, search = (max_numbers - fixed) // 3, self.expert_rank == "search"
        return {
            m: tucker.best_triple((n, *s), each, search) for m, s in layer.dims.matrices.items()
        }

    def solve(
        self, layer: MoELayer, statistics: LayerStatistics, max_numbers: int
    ) -> tuple[Integers, Factors]:
        whitened = (self.whiten, self.whiten_output, self.ridge, self.power)
        sides, sizes = tucker.layer_sides(layer, statistics, *whitened), dict[str, Any]()
        n, p, d, _ = layer.dims
        each = (max_numbers - dense_numbers(layer) + 3 * n * p * d) // 3
        rule = tucker.Rule(each, self.expert_rank == "search", self.choice == "energy")
        tensors = Factors()
        for name, stack in layer.stack()._asdict().items():
            sizes[name], parts = tucker.decomposed(stack, sides[name], rule, self.iterations)
            wide = torch.promote_types(stack.dtype, torch.float32)
            tensors |= {f"{name}.{part}": t.to(wide).contiguous() for part, t in parts.items()}
        return sizes, tensors
