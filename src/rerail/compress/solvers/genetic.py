"""Genetic search for the set of experts whose loss moves a layer's answer least."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.compress.solvers.reconstruction import Errors


@dataclass(frozen=True)
class Removals:
    """Sets of removed experts, as rows of bool (C, E); each router group loses the same number.

    Attributes:
        experts, groups: of the router.
        each: how many a group loses.
        fixed: slots that are never removed.
    """

    experts: int
    groups: int
    each: int
    fixed: Collection[int]
    generator: torch.Generator

    def random(self, count: int) -> Tensor:
        """Return random sets."""
        return self._highest(self._noise(count))

    def children(self, parents: Tensor, count: int, mutation: float) -> Tensor:
        """Return sets drawn from the unions of two parents, some with one member exchanged."""
        pairs = torch.randint(len(parents), (2, count), generator=self.generator)
        union = parents[pairs[0]] | parents[pairs[1]]
        # noise is below 1, so that members of the union come before all others
        sets = self._highest(self._noise(count) + 2 * union)
        chosen = torch.randint(self.groups, (count, 1), generator=self.generator)
        size = self.experts // self.groups
        here = torch.arange(self.experts) // size == chosen
        leaving, coming = here & sets, here & ~sets & self._free
        out = torch.where(leaving, self._noise(count), -1.0).argmax(dim=1)
        into = torch.where(coming, self._noise(count), -1.0).argmax(dim=1)
        # all draws are made for all children: which ones mutate does not move the others' draws
        mutates = torch.rand(count, generator=self.generator) < mutation
        rows = (mutates & leaving.any(dim=1) & coming.any(dim=1)).nonzero().flatten()
        sets[rows, out[rows]] = False
        sets[rows, into[rows]] = True
        return sets

    @property
    def _free(self) -> Tensor:
        free = torch.ones(self.experts, dtype=torch.bool)
        free[sorted(self.fixed)] = False
        return free

    def _noise(self, count: int) -> Tensor:
        return torch.rand(count, self.experts, generator=self.generator)

    def _highest(self, keys: Tensor) -> Tensor:
        # a fixed slot comes after every noise, and is never among the highest where enough are free
        keys = keys.masked_fill(~self._free, -1.0).view(len(keys), self.groups, -1)
        best = keys.topk(self.each, dim=2).indices
        highest = torch.zeros_like(keys, dtype=torch.bool).scatter_(2, best, True)
        return highest.view(len(keys), -1)


def evolve(
    errors: Errors,
    removals: Removals,
    population: int,
    generations: int,
    parents: float,
    mutation: float,
) -> list[tuple[int, ...]]:
    """Return every kept subset that was tried, best first, each once.

    Args:
        errors: judges kept subsets.
        removals: what may be removed.
        population: sets in the first generation, and children in each further one.
        generations: how many follow the first.
        parents: share of the population that has children, the best of all so far.
        mutation: probability that a child exchanges one member.
    """
    known: dict[tuple[int, ...], float] = {}
    sets = removals.random(population)
    elite = max(2, int(parents * population))
    for generation in range(generations + 1):
        rows = (~torch.unique(sets, dim=0)).tolist()
        kept = [tuple(e for e, stays in enumerate(row) if stays) for row in rows]
        if fresh := [subset for subset in kept if subset not in known]:
            known |= dict(zip(fresh, errors(fresh).tolist(), strict=True))
        ranked = sorted(known, key=lambda subset: (known[subset], subset))
        if generation < generations:
            best = torch.ones(len(ranked[:elite]), removals.experts, dtype=torch.bool)
            for row, subset in enumerate(ranked[:elite]):
                best[row, list(subset)] = False
            sets = removals.children(best, population, mutation)
    return ranked


def dealt(weights: Tensor, total: int, caps: Sequence[int]) -> list[int]:
    """Return integers from 0 to their cap, in proportion to weights, that sum to `total`.

    Rounded by the largest remainder, ties to the first; a higher weight never gets less under
    equal caps. What caps cut off goes to the others, in proportion again.
    """
    cap, full = torch.tensor(caps).double(), torch.zeros(len(caps), dtype=torch.bool)
    while True:
        free = torch.where(full, 0.0, weights.double())
        real = free * (total - cap[full].sum()) / free.sum().clamp(min=1e-300)
        over = ~full & (real > cap)
        if not over.any():
            break
        full |= over
    real = torch.where(full, cap, real)
    counts = (real + 1e-9).floor()
    order = torch.argsort(real - counts, descending=True, stable=True)
    left = total - int(counts.sum())
    counts[[i for i in order.tolist() if counts[i] < cap[i]][:left]] += 1
    return [int(n) for n in counts.tolist()]
