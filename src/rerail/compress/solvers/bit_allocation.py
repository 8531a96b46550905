"""Bits for experts under one limit: what bits cost, and the exact choice among them."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rerail.compress.solvers.rounding import round_to_nearest
from rerail.errors import OutOfReach
from rerail.experts.quantized import DENSE, dequantised
from rerail.moe.fused_experts import ExpertWeights
from rerail.moe.model import MoELayer

Array = npt.NDArray[Any]


def allocate_bits(
    cost: Tensor, bits: Sequence[int], max_bits: int, least: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the bits of each expert.

    Minimises sum_e cost[e, b_e] subject to sum_e b_e <= max_bits, with at least `least[i]` experts
    at `bits[i]`. The table runs over experts, bits spent and experts still needed. Of equal costs
    the fewest bits win, in total and (from the last expert on) each; where the limit is enough for
    the widest everywhere, every expert has it, also one that costs nothing.

    Args:
        cost: (E, B), the cost of expert e at bits[i].
        bits: (B,) widths, ascending.
        max_bits: what may be spent.
        least: (B,) how many experts must have each width.

    Raises:
        OutOfReach: nothing fits.
    """
    costs = cost.double().cpu().numpy()
    needs = tuple(least or [0] * len(bits))
    if max_bits >= len(costs) * bits[-1] and not any(needs[:-1]):
        return (bits[-1],) * len(costs)
    value, back = _table(costs, bits, max_bits, needs)
    row = 0
    spent = int(value[row].argmin())
    if not np.isfinite(value[row, spent]):
        raise OutOfReach(
            f"{max_bits} bits cannot be shared by {len(costs)} experts that choose from "
            f"{list(bits)} with at least {list(needs)} experts at each; allowed sums: from "
            f"{least_sum(len(costs), bits, needs)}"
        )
    chosen = []
    for e in reversed(range(len(costs))):
        row, j = divmod(int(back[e, row, spent]), len(bits))
        chosen.append(bits[j])
        spent -= bits[j]
    return tuple(reversed(chosen))


def _table(
    costs: Array, bits: Sequence[int], max_bits: int, needs: tuple[int, ...]
) -> tuple[Array, Array]:
    """Return the least cost of all experts by (experts still needed, bits spent), and the choices.

    Rows are the tuples of what is still needed, all zeros first; a choice is the row before times B
    plus the width taken.
    """
    states = list(itertools.product(*(range(n + 1) for n in needs)))
    place = {state: i for i, state in enumerate(states)}
    value = np.full((len(states), max_bits + 1), np.inf)
    value[place[needs], 0] = 0.0
    back = np.zeros((len(costs), *value.shape), dtype=np.int32)
    for e, own in enumerate(costs):
        least_cost = np.full_like(value, np.inf)
        for (i, state), (j, b) in itertools.product(enumerate(states), enumerate(bits)):
            if b > max_bits:
                continue
            to = place[tuple(max(0, n - (k == j)) for k, n in enumerate(state))]
            cost = value[i, : max_bits + 1 - b] + own[j]
            better = cost < least_cost[to, b:]
            least_cost[to, b:][better] = cost[better]
            back[e, to, b:][better] = i * len(bits) + j
        value = least_cost
    return value, back


def least_sum(experts: int, bits: Sequence[int], least: Sequence[int]) -> int:
    """Return the fewest bits that experts can have, with at least `least[i]` of them at bits[i]."""
    forced = sum(n * b for n, b in zip(least, bits, strict=True))
    return forced + (experts - sum(least)) * bits[0]


@torch.no_grad()
def block_errors(
    layer: MoELayer, hidden: Tensor, bits: Sequence[int], group: int, batch: int | None = None
) -> Tensor:
    """Return || F(X) - F(X; only expert e rounded to bits[i]) ||_F, float64 (E, B).

    F is the layer's routed output. With the routing fixed the other experts' answers cancel, so the
    square is sum over the tokens of e of g^2 || E_e(x) - E_{e,b}(x) ||^2.

    Args:
        layer: of the original model.
        hidden: (T, H) inputs.
        bits: trial widths; 16 changes nothing.
        group: of the trial quantiser, round to nearest.
        batch: rows in a batch, over which norms are added up; None for one norm over all rows.
    """
    stacks = layer.stack()
    hidden = hidden.to(stacks.gate)
    index, gates = layer.route(hidden)
    exact = _pairs(layer, hidden, index)
    errors = []
    for b in bits:
        if b == DENSE:
            errors.append(torch.zeros(layer.num_experts, dtype=torch.float64))
            continue
        coded = [round_to_nearest(stack, b, group) for stack in stacks]
        rounded = ExpertWeights(*(dequantised(c, group).to(stacks.gate.dtype) for c in coded))
        change = _pairs(layer, hidden, index, **layer.layout.pack(rounded)) - exact
        squares = (gates.double() * change.double().norm(dim=-1)).square()
        pieces = (torch.split(t, batch or len(hidden)) for t in (index, squares))
        norms = [
            torch.bincount(i.flatten(), s.flatten(), minlength=layer.num_experts)
            for i, s in zip(*pieces, strict=True)
        ]
        errors.append(torch.stack(norms).sqrt().sum(dim=0).cpu())
    return torch.stack(errors, dim=1)


def _pairs(layer: MoELayer, hidden: Tensor, index: Tensor, **swapped: Tensor) -> Tensor:
    """Return each chosen expert's own output (T, K, H)."""
    each, ones = index.reshape(-1, 1), hidden.new_ones(index.numel(), 1)
    out = layer.run(hidden.repeat_interleave(index.shape[1], dim=0), each, ones, **swapped)
    return out.view(*index.shape, -1)
