"""Ranks that use a number of stored numbers up, by exact integer completion."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rerail.errors import OutOfReach
from rerail.moe.model import MoELayer


class Ranks(NamedTuple):
    """Ranks to be chosen for one matrix type.

    Attributes:
        cost: numbers that one more rank stores.
        cap: the largest that makes sense.
        experts: how many there are, one each; None where one rank serves all.
    """

    cost: int
    cap: int
    experts: int | None


def ranks_within(
    layer: MoELayer,
    max_numbers: int,
    fixed: int,
    types: Mapping[str, Ranks],
    scores: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return ranks that fill `max_numbers` to less than the cost of one more.

    Args:
        layer: whose experts are factorised.
        max_numbers: what may be stored.
        fixed: the numbers stored whatever the ranks.
        types: the ranks to be chosen by matrix type.
        scores: how they compare, (E,) by matrix type; they are equal where there are none.

    Returns:
        a rank by matrix type, or a tuple of one for each expert.

    Raises:
        OutOfReach: not even rank 1 fits, or full rank leaves numbers over.
    """
    spread = [(r, max(1, r.experts or 1)) for r in types.values()]
    costs = [r.cost for r, many in spread for _ in range(many)]
    caps = [r.cap for r, many in spread for _ in range(many)]
    most = fixed + sum(cost * cap for cost, cap in zip(costs, caps, strict=True))
    check_reach(layer, max_numbers, fixed + sum(costs), most, max(costs))
    even = {name: torch.ones(r.experts or 1) for name, r in types.items()}
    flat = torch.cat([{**even, **scores}[name].double().flatten() for name in types])
    ranks, at = filled(flat, costs, caps, max_numbers - fixed), 0
    sizes: dict[str, Any] = {}
    for name, (rank, many) in zip(types, spread, strict=True):
        chosen = tuple(ranks[at : at + many])
        sizes[name], at = chosen if rank.experts else chosen[0], at + many
    return sizes


def check_reach(layer: MoELayer, max_numbers: int, least: int, most: int, quantum: int = 0) -> None:
    """Check that a layer can be factorised to a number of stored numbers.

    Args:
        layer: whose experts are factorised.
        max_numbers: what may be stored.
        least, most: what rank 1 and full rank store.
        quantum: what one more rank stores at most.

    Raises:
        OutOfReach: not even rank 1 fits, or full rank leaves numbers over.
    """
    dense = layer.expert_size * layer.num_experts
    if least <= max_numbers and (max_numbers - most < quantum or max_numbers >= dense):
        return
    low, high = max(0.0, 1 - most / dense), max(0.0, 1 - least / dense)
    raise OutOfReach(
        f"layer {layer.index} cannot be factorised to {max_numbers / dense:.4g} of its numbers: "
        f"rank 1 takes {least / dense:.4g} of them, full rank {most / dense:.4g}; ratios from "
        f"{low:.4g} to {high:.4g} can be reached"
    )


def filled(scores: Tensor, costs: Sequence[int], caps: Sequence[int], max_cost: int) -> list[int]:
    """Return integers from 1 to their cap, in proportion to scores, that cost at most `max_cost`.

    The real numbers clamp(t * score, 1, cap) that cost just as much are rounded down; what is
    left goes to the largest remainders, ties to the first. What remains is less than one cost.
    """
    cost, cap = torch.tensor(costs).double(), torch.tensor(caps).double()
    score = (scores / scores.max()).clamp(min=1e-9)

    def real(t: float) -> Tensor:
        return torch.minimum((t * score).clamp(min=1.0), cap)

    # the cost rises with t; 200 halvings end at two neighbouring doubles, whatever the scale
    low, high = 0.0, float(cap.max() / score.min())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(cost @ real(middle)) <= max_cost else (low, middle)
    exact = real(high) if float(cost @ real(high)) <= max_cost else real(low)
    ranks = (exact + 1e-9).floor()  # an integer but for rounding is that integer
    left = max_cost - int(cost @ ranks)
    for i in torch.argsort(exact - ranks, descending=True, stable=True).tolist():
        if ranks[i] < cap[i] and costs[i] <= left:
            ranks[i] += 1
            left -= costs[i]
    return [int(r) for r in ranks.tolist()]
