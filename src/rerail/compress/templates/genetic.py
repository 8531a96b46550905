"""Pruners by genetic search: which experts of a layer go, and how many of each layer."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.compress.templates.reconstructing import Errors, Free, Reconstructor, Sample
from rerail.errors import OutOfReach
from rerail.moe.model import MoELayer
from rerail.plan.allocation import Allocation, Uniform
from rerail.plan.budget import Ratio
from rerail.statistics.statistic import LayerStatistics, Statistic, StatisticSet
from rerail.statistics.token_sample import TokenSample


@dataclass(frozen=True, kw_only=True)
class GeneticPruner(Reconstructor):
    """Searches for the removed set that changes the answer least on sampled rows.

    Attributes:
        rows: how many inputs of the experts are sampled.
        population: removed sets in the first generation, and children in each further one.
        generations: how many follow the first.
        parents: share of the population that has children: the best of all so far.
        mutation: probability that a child exchanges one member.
        seed: of the search in each layer.
        nonuniform: deal what goes out over layers in inverse proportion to their importance, the
            sum of their experts' ranks; false, or another allocation than uniform, lets that say.
    """

    rows: int = 512
    population: int = 24
    generations: int = 12
    parents: float = 0.2
    mutation: float = 0.3
    seed: int = 0
    nonuniform: bool = True

    @property
    def measures(self) -> tuple[Statistic, ...]:
        """Sampled inputs of the experts."""
        return (TokenSample(self.rows),)

    def sample(self, layer: MoELayer, statistics: LayerStatistics) -> Sample:
        """Return the layer's answers on the sampled inputs."""
        return Sample(layer, TokenSample.hidden(statistics[TokenSample(self.rows)]))

    def measure(self, statistics: LayerStatistics, change: Tensor) -> Tensor:
        """Return the Frobenius norm of each subset's change."""
        norm: Tensor = torch.linalg.vector_norm(change, dim=(0, 2), dtype=torch.float64)
        return norm

    def search(self, layer: MoELayer, errors: Errors, count: int, free: Free) -> tuple[int, ...]:
        """Return the best set that was tried; every router group loses the same number."""
        experts, groups = layer.num_experts, layer.num_groups
        fixed = set(range(experts)) - set(free(range(experts)))
        generator = torch.Generator().manual_seed(self.seed)
        removals = Removals(experts, groups, (experts - count) // groups, fixed, generator)
        return evolve(
            errors, removals, self.population, self.generations, self.parents, self.mutation
        )[0]

    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """Check top_k and groups before anything heavy."""
        if not self.nonuniform or not isinstance(allocation, Uniform):
            super().check(layers, ratio, allocation)
            return
        self._counts(layers, ratio, [1.0] * len(layers), [frozenset()] * len(layers))

    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Ratio,
        allocation: Allocation,
    ) -> list[int]:
        """Return kept counts: an important layer loses less."""
        if not self.nonuniform or not isinstance(allocation, Uniform):
            return super().allocate(layers, statistics, ratio, allocation)
        views = [statistics.of(layer, self.requires) for layer in layers]
        ranks = [self.rank(layer, held) for layer, held in zip(layers, views, strict=True)]
        importance = [float(rank.clamp(min=0).sum()) for rank in ranks]
        return self._counts(layers, ratio, importance, self.guarded(views))

    def _counts(
        self,
        layers: Sequence[MoELayer],
        ratio: Ratio,
        importance: Sequence[float],
        guarded: Sequence[frozenset[int]],
    ) -> list[int]:
        groups, experts = layers[0].num_groups, [layer.num_experts for layer in layers]
        caps = [_spare(layer, slots) for layer, slots in zip(layers, guarded, strict=True)]
        total = int(sum(experts) * ratio.removed + 1e-9) // groups
        if total > sum(caps):
            raise OutOfReach(
                f"{type(self).__name__} cannot remove {total * groups} of {sum(experts)} experts: "
                f"top-k routing, router groups and the guard leave {sum(caps) * groups} to choose "
                f"from; allowed ratios: 0 to {sum(caps) * groups / sum(experts):.4g}"
            )
        share = torch.tensor(importance, dtype=torch.float64)
        weights = 1 / (share / share.max().clamp(min=1e-300)).clamp(min=1e-9)
        removed = dealt(weights, total, caps)
        return [n - groups * gone for n, gone in zip(experts, removed, strict=True)]


def _spare(layer: MoELayer, guarded: frozenset[int]) -> int:
    """Return how many experts every router group can lose."""
    size = layer.num_experts // layer.num_groups
    held = [sum(slot // size == g for slot in guarded) for g in range(layer.num_groups)]
    return size - max(layer.least_per_group, *held)


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
        found = self._highest(self._noise(count) + 2 * union)
        chosen = torch.randint(self.groups, (count, 1), generator=self.generator)
        size = self.experts // self.groups
        here = torch.arange(self.experts) // size == chosen
        leaving, coming = here & found, here & ~found & self._free
        out = torch.where(leaving, self._noise(count), -1.0).argmax(dim=1)
        into = torch.where(coming, self._noise(count), -1.0).argmax(dim=1)
        mutates = torch.rand(count, generator=self.generator) < mutation
        rows = (mutates & leaving.any(dim=1) & coming.any(dim=1)).nonzero().flatten()
        found[rows, out[rows]] = False
        found[rows, into[rows]] = True
        return found

    @property
    def _free(self) -> Tensor:
        free = torch.ones(self.experts, dtype=torch.bool)
        free[sorted(self.fixed)] = False
        return free

    def _noise(self, count: int) -> Tensor:
        return torch.rand(count, self.experts, generator=self.generator)

    def _highest(self, keys: Tensor) -> Tensor:
        keys = keys.masked_fill(~self._free, -1.0).view(len(keys), self.groups, -1)
        best = keys.topk(self.each, dim=2).indices
        found = torch.zeros_like(keys, dtype=torch.bool).scatter_(2, best, True)
        return found.view(len(keys), -1)


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
