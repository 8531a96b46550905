"""ResMoE: a centre for all experts of a layer, and compressed residuals (arXiv 2503.06881).

Needs no data. An expert is the cloud of its I channels, D_e = [W_gate | W_up | W_down^T] (I, 3H),
with biases as further columns for the matching only. The centre D_w is the Wasserstein barycentre
of the clouds (see `alignment.barycentre`): D_w = mean_e D_e[pi_e], pi_e the matching to D_w. With

    Delta_e = D_e[pi_e] - D_w,        W_e = D_w + compressed(Delta_e),

channels stay in the centre's order. Weights are added; the code's inference module adds outputs.

1. `kind=up`: of each Delta_e the k largest entries stay, and one bit for each entry says which.
   Bits at width 16: 16 * 3HI + E (3HI + 16 k), so that a layer keeps at least 1/E + 1/16.
2. `kind=svd`: Delta_e has rank r_e, all equal within one, and takes r_e (I + 3H) numbers.
3. `align=first` matches every expert to the first once, `none` (ours) takes the plain mean.

The paper's "75 %" of Mixtral is of the residuals, index bits not counted, in the last 24 layers
(`allocation=per_layer`): 37.5 % of a layer stays. Here the ratio is of all that is stored.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rerail.compress.solvers.alignment import barycentre, channel_features, ordered
from rerail.compress.solvers.ranks import Ranks, ranks_within
from rerail.compress.solvers.whitening import Moments, low_rank
from rerail.compress.templates.factoriser import Factoriser, Factors, Integers
from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec
from rerail.experts.residual import by_matrix, largest
from rerail.moe.model import MoELayer
from rerail.plan.budget import dense_numbers
from rerail.statistics.statistic import LayerStatistics


@dataclass(frozen=True, kw_only=True)
class ResMoE(Factoriser):
    """Stores a centre, and sparse or low-rank residuals.

    Attributes:
        kind, align: see above; iterations: of the barycentre, at most.
    """

    kind: Literal["up", "svd"] = "up"
    align: Literal["barycentre", "first", "none"] = "barycentre"
    iterations: int = 100

    paper: ClassVar[str] = "arXiv 2503.06881"

    def sizes(self, layer: MoELayer, max_numbers: int, statistics: object = None) -> Integers:
        """Return how many values, or the ranks, of each residual."""
        (n, p, d, _), dense = layer.dims, dense_numbers(layer)
        fixed = dense - 3 * (n - 1) * p * d
        if self.kind == "svd":
            ranks = {"rank": Ranks(p + 3 * d, min(p, 3 * d), n)}
            return ranks_within(layer, max_numbers, fixed, ranks, {})
        fixed += n * -(-3 * p * d // 16)
        if max_numbers >= fixed + n:
            return {"values": min((max_numbers - fixed) // n, 3 * p * d)}
        raise OutOfReach(
            f"layer {layer.index}: a centre and a bit for each entry of {n} residuals take more "
            f"than {max_numbers / dense:.4g} of its numbers, {fixed / dense:.4g}; ratios from 0 to "
            f"{1 - (fixed + n) / dense:.4g} can be reached"
        )

    def spec(self, layer: MoELayer, sizes: Integers) -> BankSpec:
        options = {"residual": "sparse" if self.kind == "up" else "low_rank"}
        options |= {"biases": "gate+up"} if "gate_up_proj_bias" in layer.dims.numbers else {}
        return BankSpec("residual", layer.num_experts, (), dict(sizes), options)

    def factor(self, layer: MoELayer, statistics: LayerStatistics, sizes: Integers) -> Factors:
        """Solve the centre, then the residuals against it as it is stored."""
        rounds = {"none": 0, "first": 1, "barycentre": self.iterations}[self.align]
        fused, n, width = layer.bank.by_slot(), layer.num_experts, 3 * layer.hidden_size
        experts = [{name: t.detach()[e] for name, t in fused.items()} for e in range(n)]
        clouds = torch.stack([channel_features(expert, layer.layout) for expert in experts])
        centre, orders = barycentre(clouds, rounds)
        clouds = ordered(clouds, orders)
        base = centre[:, :width].to(fused["down_proj"].dtype).to(clouds.dtype)
        tensors, residuals = {"base": by_matrix(base)}, clouds[..., :width] - base
        if self.kind == "up":
            tensors["mask"], tensors["values"] = largest(by_matrix(residuals), sizes["values"])
        else:
            moments = Moments(None, torch.zeros(n), width)
            tensors["U"], rows = low_rank(residuals, moments, sizes["rank"])
            tensors["V"] = by_matrix(rows)
        if clouds.shape[-1] > width:
            tensors["gate_bias"], tensors["up_bias"] = clouds[..., width:].unbind(-1)
        return tensors
