"""Allocation by search: experts move between layers, and what a student says decides.

EvoESAP (arXiv 2603.06003) evolves the counts n_l of kept experts under any pruner's ranking; RCO
(arXiv 2605.00649) optimises them with the budget met exactly. Here (ours: neither one's code, and
few evaluations) it is the first idea at the second's constraint:

    maximise f(n)   over   sum_l n_l = N,   floor_l <= n_l <= E_l

with N the uniform total, f the fitness of the student on a few calibration blocks, mean ESAP to the
teacher or minus the mean KL. A child is one of the best so far after up to `switches` level
switches, each of which takes 1 to `largest` experts from one layer and gives them to another, so
that the total stays. Uniform counts are judged first and those of `GlobalScore` second, so that the
result is never worse than either on the text that it was judged on.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rerail.errors import InputError
from rerail.plan.allocation import (
    Allocation,
    GlobalScore,
    Layers,
    Scores,
    counts_of,
    shares_of,
)

Kept = tuple[int, ...]  # experts that stay, layer by layer
Fitness = Callable[[Kept], float]  # higher is better

_PATIENCE = 200  # children in a row that were known before: all within reach have been judged


@dataclass(frozen=True)
class Search(Allocation):
    """Counts of kept experts a layer that fit best on calibration text, at the uniform total.

    Attributes:
        evaluations: students that are judged, at most.
        measure: the fitness: `esap`, or `kl` for minus the KL, both a token.
        blocks: leading calibration blocks that students are judged on.
        floor: experts that every layer keeps, where the method needs no more.
        parents: how many of the best so far have children.
        switches, largest: most level switches of a child, and most experts that one moves.
        seed: of the mutations.
    """

    compares: ClassVar[bool] = True
    searches: ClassVar[bool] = True

    evaluations: int = 64
    measure: Literal["esap", "kl"] = "esap"
    blocks: int = 16
    floor: int = 1
    parents: int = 4
    switches: int = 3
    largest: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("evaluations", "blocks", "floor", "parents", "switches", "largest"):
            if getattr(self, name) < 1:
                raise InputError(f"allocation.{name}={getattr(self, name)} must be at least 1")
        if self.measure not in ("esap", "kl"):
            raise InputError(f"allocation.measure={self.measure!r} is not one of esap, kl")

    def shares(
        self, layers: Layers, removed: float, least: Sequence[int], scores: Scores = None
    ) -> list[float]:
        """Return where the search begins: the shares of equal scores, with the floors met.

        Raises:
            OutOfReach: the layers must keep more than there is.
        """
        return GlobalScore(self.floor).shares(layers, removed, least)

    def with_fitness(self, fitness: Fitness) -> "Searching":
        """Return the allocation that searches by this fitness."""
        return Searching(self, fitness)


@dataclass
class Searching(Allocation):
    """A search that can judge.

    Attributes:
        judged: fitness of all counts that were judged, in their order; the first are even.
    """

    compares: ClassVar[bool] = True

    settings: Search
    fitness: Fitness
    judged: dict[Kept, float] = field(default_factory=dict)

    def shares(
        self, layers: Layers, removed: float, least: Sequence[int], scores: Scores = None
    ) -> list[float]:
        """Search, and return the shares that leave the best counts; of equals the first judged."""
        settings = self.settings
        low = [max(settings.floor, n) for n in least]
        starts = [settings.shares(layers, removed, least)]
        if scores is not None:
            starts.append(GlobalScore(settings.floor).shares(layers, removed, least, scores))
        for start in starts:
            self._judge(tuple(counts_of(layers, start)))
        draws, known_again = random.Random(settings.seed), 0
        high = [layer.num_experts for layer in layers]
        while len(self.judged) < settings.evaluations and known_again < _PATIENCE:
            parent = draws.choice(self.ranked()[: settings.parents])
            child = mutated(parent, low, high, settings, draws)
            known_again = known_again + 1 if child in self.judged else 0
            self._judge(child)
        return shares_of(layers, self.ranked()[0])

    def _judge(self, kept: Kept) -> None:
        if kept not in self.judged and len(self.judged) < self.settings.evaluations:
            self.judged[kept] = self.fitness(kept)

    def ranked(self) -> list[Kept]:
        """Return all counts that were judged, the best first."""
        return sorted(self.judged, key=lambda kept: -self.judged[kept])  # stable: ties in order

    def lineage(self) -> dict[str, object]:
        """Return what a plan says about its search."""
        values = list(self.judged.values())
        found = {"evaluations": len(values), "even": values[0], "best": max(values)}
        return {"search": {"measure": self.settings.measure, **found}}


def mutated(
    parent: Kept, low: Sequence[int], high: Sequence[int], settings: Search, draws: random.Random
) -> Kept:
    """Return counts after some level switches: the same total, inside [low, high]."""
    kept = list(parent)
    for _ in range(draws.randint(1, settings.switches)):
        giving = [i for i, n in enumerate(kept) if n > low[i]]
        taking = [i for i, n in enumerate(kept) if n < high[i]]
        pairs = [(a, b) for a in giving for b in taking if a != b]
        if not pairs:
            break
        a, b = draws.choice(pairs)
        moved = draws.randint(1, min(settings.largest, kept[a] - low[a], high[b] - kept[b]))
        kept[a] -= moved
        kept[b] += moved
    return tuple(kept)
