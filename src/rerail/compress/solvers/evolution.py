"""Steady evolution of tensors, one for each group of layers, by a fitness that is dear to ask."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.compress.solvers.genetic import Removals
from rerail.moe.model import MoELayer

Genome = tuple[Tensor, ...]
# a child of two parents, which may be one and the same
Vary = Callable[[Genome, Genome], Genome]

_PATIENCE = 200  # children in a row that were known before
_FRONT = 5  # the front is the best one in so many


@dataclass
class Evolution:
    """Judges genomes, each once, and breeds from the best so far.

    Attributes:
        fitness: of a genome, higher is better.
        crossover: probability that a child has two parents.
        from_front: probability that a parent is one of the best fifth, else any of all.
        draws: of parents.
    """

    fitness: Callable[[Genome], float]
    crossover: float
    from_front: float
    draws: random.Random

    def __post_init__(self) -> None:
        self.judged: dict[tuple[bytes, ...], tuple[float, Genome]] = {}

    @property
    def best(self) -> Genome:
        """The best so far, of equals the first."""
        return self._ranked()[0]

    def judge(self, genomes: Iterable[Genome]) -> None:
        """Judge those that are new."""
        for genome in genomes:
            key = _key(genome)
            if key not in self.judged:
                self.judged[key] = (self.fitness(genome), genome)

    def run(self, vary: Vary, iterations: int) -> None:
        """Judge so many children, fewer where no new ones can be bred."""
        last, again = len(self.judged) + iterations, 0
        while len(self.judged) < last and again < _PATIENCE:
            first = self._parent()
            second = self._parent() if self.draws.random() < self.crossover else first
            child = vary(first, second)
            again = again + 1 if _key(child) in self.judged else 0
            self.judge([child])

    def summary(self) -> dict[str, float]:
        """Return how many were judged, the fitness of the first and that of the best."""
        values = [value for value, _ in self.judged.values()]
        return {"evaluations": len(values), "first": values[0], "best": max(values)}

    def _ranked(self) -> list[Genome]:
        ranked = sorted(self.judged.values(), key=lambda pair: -pair[0])  # stable: ties in order
        return [genome for _, genome in ranked]

    def _parent(self) -> Genome:
        ranked = self._ranked()
        front = ranked[: max(1, len(ranked) // _FRONT)]
        return self.draws.choice(front if self.draws.random() < self.from_front else ranked)


def _key(genome: Genome) -> tuple[bytes, ...]:
    return tuple(part.numpy().tobytes() for part in genome)


def removals_of(layer: MoELayer, kept: Sequence[int], generator: torch.Generator) -> Removals:
    """Return the sets of experts that can be removed so that as many stay as in `kept`."""
    each = (layer.num_experts - len(kept)) // layer.num_groups
    return Removals(layer.num_experts, layer.num_groups, each, (), generator)


def removed_of(pools: Sequence[Removals], sets: Sequence[Sequence[int]]) -> Genome:
    """Return bool (E,) for each kept set: what it leaves out."""
    rows = [torch.ones(pool.experts, dtype=torch.bool) for pool in pools]
    for row, kept in zip(rows, sets, strict=True):
        row[list(kept)] = False
    return tuple(rows)


def kept_of(removed: Genome) -> list[tuple[int, ...]]:
    """Return the slots that each row of bool (E,) leaves: the inverse of `removed_of`."""
    return [tuple(torch.nonzero(~row).flatten().tolist()) for row in removed]


def one_hot(pools: Sequence[Removals], sets: Sequence[Sequence[int]]) -> Genome:
    """Return the matrices (M, E) whose rows pick the kept experts."""
    pairs = zip(pools, sets, strict=True)
    return tuple(torch.eye(pool.experts, dtype=torch.float64)[list(kept)] for pool, kept in pairs)


def varied_sets(
    pools: Sequence[Removals], first: Genome, second: Genome, mutation: float
) -> Genome:
    """Return a child of removed sets: of the union of both, with at times a member exchanged."""
    parents = [torch.stack(pair) for pair in zip(first, second, strict=True)]
    return tuple(
        pool.children(pair, 1, mutation)[0] for pool, pair in zip(pools, parents, strict=True)
    )


def varied_matrices(
    first: Genome,
    second: Genome,
    generator: torch.Generator,
    mutation: float,
    scale: float,
    normalise: float,
) -> Genome:
    """Return a child of matrices (M, E): each a parent's, with some entries moved.

    Args:
        first, second: the parents.
        generator: of all draws.
        mutation: probability that an entry moves.
        scale: standard deviation of its step.
        normalise: probability that the rows of a matrix are brought to the sum 1.
    """

    def chance(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    child = []
    for pair in zip(first, second, strict=True):
        own = pair[int(chance(1) < 0.5)]
        steps = scale * torch.randn(own.shape, generator=generator, dtype=own.dtype)
        own = own + torch.where(chance(*own.shape) < mutation, steps, 0.0)
        sums = own.sum(dim=1, keepdim=True)
        if bool(chance(1) < normalise) and bool((sums > 0.1).all()):
            own = own / sums
        child.append(own)
    return tuple(child)
