"""Search by reconstruction: how far a layer's answer moves on sampled rows without some experts.

Every expert answers the rows once, (n, E, H); a subset of experts is then judged by routing the
rows anew (the model's own router, the others silenced) and adding the answers up again.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from rerail.moe.model import MoELayer

# of (n, C, H) changes for C subsets: (C,)
Measure = Callable[[Tensor], Tensor]
# of kept subsets: (C,), lower is better
Errors = Callable[[Sequence[Sequence[int]]], Tensor]
# of what is left: what may go next
Free = Callable[[Sequence[int]], list[int]]

_NUMBERS = 1 << 24  # of changes in memory at once


class Sample:
    """A layer's answers on rows (n, H).

    Attributes:
        outputs: (n, E, H) float32, every expert's output before the gate.
        gates: (n, E) float32, gate weights with all experts, 0 where not chosen.
        offset: (n, H) what the answer with all experts is off the target, None where it is it.
    """

    def __init__(self, layer: MoELayer, hidden: Tensor, target: Tensor | None = None):
        self.layer = layer
        rows = layer.router_rows
        self.hidden = hidden.to(rows.device, rows.dtype)
        self.gates = self.routed(None)
        self.outputs = every_output(layer, self.hidden).float()
        self.offset = None if target is None else self.answer() - target.to(self.outputs)

    def judged_by(self, measure: Measure) -> Errors:
        """Return the function that judges kept subsets by a measure of their changes."""
        return partial(self.errors, measure=measure)

    def routed(self, kept: Sequence[int] | None) -> Tensor:
        """Return gate weights (n, E) where only these slots may be selected."""
        index, weights = self.layer.route(self.hidden, kept)
        gates = torch.zeros(len(index), self.layer.num_experts, device=index.device)
        return gates.scatter_add_(1, index, weights.float())

    def answer(self) -> Tensor:
        """Return the routed output with all experts, (n, H)."""
        return torch.bmm(self.gates.unsqueeze(1), self.outputs).squeeze(1)

    def errors(self, subsets: Sequence[Sequence[int]], measure: Measure) -> Tensor:
        """Return the measure of each kept subset's change, float64 (C,)."""
        n, _, width = self.outputs.shape
        step = max(1, _NUMBERS // max(1, n * width))
        measured = []
        for start in range(0, len(subsets), step):
            gates = [self.routed(kept) for kept in subsets[start : start + step]]
            moved = torch.stack(gates, dim=1) - self.gates.unsqueeze(1)
            change = torch.bmm(moved, self.outputs)
            if self.offset is not None:
                change += self.offset.unsqueeze(1)
            measured.append(measure(change).double().cpu())
        return torch.cat(measured).nan_to_num(nan=torch.inf)


def every_output(layer: MoELayer, hidden: Tensor) -> Tensor:
    """Return what every expert answers to every row (n, H), before the gate: (n, E, H)."""
    gate = hidden.new_ones(len(hidden), 1)
    chosen = [torch.full_like(gate, e, dtype=torch.int64) for e in range(layer.num_experts)]
    return torch.stack([layer.run(hidden, e, gate) for e in chosen], dim=1)


def errors_without_each(layer: MoELayer, errors: Errors) -> Tensor:
    """Return the error without each single expert, float64 (E,); equal where none can go."""
    slots = range(layer.num_experts)
    if len(slots) == layer.top_k:
        return torch.ones(len(slots), dtype=torch.float64)
    return errors(without_each(slots, [[slot] for slot in slots]))


def removable(layer: MoELayer, guarded: Collection[int], least_per_group: int) -> Free:
    """Return the function that names what may go next: nothing guarded, and groups stay filled."""
    size = layer.num_experts // layer.num_groups

    def free(left: Sequence[int]) -> list[int]:
        groups = [slot // size for slot in left]
        return [e for e in left if e not in guarded and groups.count(e // size) > least_per_group]

    return free


def without_each(left: Sequence[int], parts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return what is left without each part."""
    return [[slot for slot in left if slot not in part] for part in parts]


def exhaustive(errors: Errors, experts: int, count: int, free: Free) -> tuple[int, ...]:
    """Return the kept subset of lowest error among all that may be reached."""
    subsets = list(reachable(experts, count, free))
    return tuple(subsets[int(errors(subsets).argmin())])


def reachable(experts: int, count: int, free: Free) -> Iterator[list[int]]:
    """Yield the subsets of `count` experts from which one step back is always allowed."""
    for dropped in combinations(range(experts), experts - count):
        left = list(range(experts))
        for slot in dropped:
            if slot not in free(left):
                break
            left.remove(slot)
        else:
            yield left


def coarse_to_fine(
    errors: Errors, experts: int, count: int, free: Free, size: int = 1, least: int = 1
) -> tuple[int, ...]:
    """Drop one expert at a time, the one whose loss moves the answer least, and return the rest.

    With `size` S > 1, those that may go are first judged in groups of S neighbours, each as if all
    of it went; only members of the best group are judged singly. S = 1, and S so large that there
    is one group, are the plain greedy search. At least `least` experts stay in every judgement.
    """
    left = list(range(experts))
    while len(left) > count:
        candidates = free(left)
        step = min(size, len(left) - least)
        if size < len(candidates) and step > 1:
            groups = [candidates[i : i + step] for i in range(0, len(candidates), step)]
            candidates = groups[int(errors(without_each(left, groups)).argmin())]
        single = errors(without_each(left, [[slot] for slot in candidates]))
        left.remove(candidates[int(single.argmin())])
    return tuple(left)
