"""MergeMoE: merged experts that answer as their members do together (arXiv 2510.14436, section 3).

1. The M most used experts of a layer are centres; every other one joins the centre whose weights
   [W_U ; W_G], flattened (2 I H), are most similar. The paper does not name the similarity:
   `similarity_of=cosine`, or `l2` for the negative squared distance.
2. b_e = f_e / sum_{e in c} f_e, f_e the usage count (theorem 1); a group never used is averaged.
3. W_G' = sum b_e W_G^e, W_U' = sum b_e W_U^e, biases alike.
4. W_D' (H, I) is fitted to the members' outputs on n sampled inputs X of the layer. With P (I, n)
   the hidden activations under W_G', W_U' and Y (H, n) = sum b_e E_e(X), the paper's
   [.. b_e W_D^e ..] Q P^+ is Y P^+; with G = P P^T, C = Y P^T, W = sum b_e W_D^e, g = mean diag G

       W_D' = (C + r g W)(G + r g 1)^-1 = W + (C - W G)(G + r g 1)^-1

   The paper has no r=ridge, and collapses where inputs are few; r -> inf is averaging, r=0 its fit,
   but a direction that no input excites keeps the average. r=0 needs n >= I and is refused
   otherwise; with r > 0 fewer are enough, and the plan's notes say so. All sums are float64.
5. The router keeps its E rows; the template offers the other policies.

Which tokens make X is not said: `tokens=all`; `routed`, those that chose a member; `gated`, those
with columns scaled by their summed gate weight. The paper compresses a range of layers
(`allocation=per_layer`). It has no public code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.solvers import grouping
from rerail.compress.solvers.least_squares import normal_equations, ridge_solution
from rerail.compress.templates.merger import Merger
from rerail.errors import InputError
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation
from rerail.plan.budget import Budget
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, Statistic
from rerail.statistics.token_sample import TokenSample


@dataclass(frozen=True, kw_only=True)
class MergeMoE(Merger):
    """Merges experts into the most used ones and refits their down projections.

    Attributes:
        similarity_of, ridge, tokens: see above.
        inputs: n, how many are sampled in each layer.
    """

    similarity_of: Literal["cosine", "l2"] = "cosine"
    ridge: float = 0.1
    tokens: Literal["all", "routed", "gated"] = "all"
    inputs: int = 4096

    paper: ClassVar[str] = "arXiv 2510.14436"
    around_dominants: ClassVar[bool] = True

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return (Count(), TokenSample(self.inputs))

    def check(self, layers: Sequence[MoELayer], budget: Budget, allocation: Allocation) -> None:
        """Check the budget, and that a fit without ridge can have enough inputs."""
        if self.ridge < 0:
            raise InputError(f"compressor.ridge={self.ridge}; allowed: 0 or more")
        super().check(layers, budget, allocation)
        for layer in layers:
            self.notes(layer, [self.inputs])

    def notes(self, layer: MoELayer, inputs: Sequence[int]) -> tuple[str, ...]:
        """Say which fits have fewer inputs than the expert has channels; refuse without a ridge."""
        need, short = layer.intermediate_size, [n for n in inputs if n < layer.intermediate_size]
        fact = (
            f"layer {layer.index}: {len(short)} of {len(inputs)} least squares fits have fewer "
            f"than {need} inputs (fewest: {min(inputs, default=0)})"
        )
        if short and self.ridge == 0:
            raise InputError(
                f"{fact} and compressor.ridge={self.ridge}; allowed: more calibration text, "
                f"compressor.inputs of {need} or more, or a ridge above 0"
            )
        return (f"{fact}; the ridge towards the average makes up for them",) if short else ()

    def group(self, layer: MoELayer, statistics: LayerStatistics, num_stored: int) -> Tensor:
        centres = self.dominants(layer, statistics, num_stored)
        return grouping.labels_around(self.similarity(layer), centres)

    def similarity(self, layer: MoELayer) -> Tensor:
        """Return cosines, or negative squared distances, of [W_U ; W_G]."""
        gram = grouping.weight_gram(*layer.stack()[:2])
        norms = gram.diagonal().unsqueeze(1) + gram.diagonal()
        return grouping.cosine(gram) if self.similarity_of == "cosine" else 2 * gram - norms

    def solve(
        self, layer: MoELayer, statistics: LayerStatistics, labels: Tensor
    ) -> tuple[grouping.Fused, tuple[str, ...]]:
        share = grouping.shares_in_group(labels, self.weights(statistics))
        merged = grouping.merged_experts(layer, labels, share)
        inputs = TokenSample.hidden(statistics[TokenSample(self.inputs)]).to(merged["down_proj"])
        columns, flip = self.columns(layer, inputs, labels), layer.layout.transposed
        fits = torch.nonzero(torch.bincount(labels) > 1).flatten().tolist()
        for c in fits:
            chosen, members = columns[:, c] > 0, torch.nonzero(labels == c).flatten()
            expert = {name: tensor[c : c + 1] for name, tensor in merged.items()}
            x, scale = inputs[chosen], columns[chosen, c]
            sums = normal_equations(layer, members, share[members], expert, x, scale)
            down = merged["down_proj"][c].mT if flip else merged["down_proj"][c]
            down.copy_(ridge_solution(*sums, down, self.ridge))
        return merged, self.notes(layer, (columns > 0).sum(dim=0)[fits].tolist())

    def columns(self, layer: MoELayer, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return (n, M): the factor of each input in each group's fit, 0 where it has no part."""
        if self.tokens == "all":
            return inputs.new_ones(len(inputs), int(labels.max()) + 1)
        index, gates = layer.route(inputs.to(layer.router_rows.dtype))
        gates = gates.to(inputs) if self.tokens == "gated" else torch.ones_like(gates).to(inputs)
        factors = inputs.new_zeros(len(inputs), int(labels.max()) + 1)
        factors.scatter_add_(1, labels.to(index.device)[index], gates)
        return factors if self.tokens == "gated" else factors.clamp(max=1)
