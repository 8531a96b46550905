"""EEP: evolution, without gradients, of which experts stay and what they are (arXiv 2407.00945).

Students are judged as a whole: by -KL to the teacher on a few blocks of the calibration text (or
ESAP, `measure`; the paper has task accuracy). Layers of a group share all choices (4 groups).

Phase 1: W_RM = W_EM = one-hot rows (M, E): a kept set for each group. Random sets are judged, then
in each iteration one child of one or two (`crossover`) of the best so far: drawn from the union of
its parents' sets, with one member exchanged at probability `mutation`. The plan is a pruner's.

Phase 2 (`merging` iterations): W_EM becomes real, expert j is sum_i W_EM[j, i] expert_i, every
matrix alike. A child has for each group one parent's W_EM; an entry moves by a normal step of
`scale` at probability `mutation`; rows are brought to the sum 1 at probability `normalise`.

Not as in the paper: the router matrix W_RM (p' = W_RM softmax(z) before top-k) stays one-hot in
phase 2, so that the router is sliced and every family can be a student; W_EM alone is searched.
Ours: the first set is the most used experts of each group, so that the result is never worse than
these on the text that judges. 40 + 160 iterations are the paper's, probabilities its code's.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rerail.compress.base import Fitness, Layers
from rerail.compress.solvers.evolution import (
    Evolution,
    Genome,
    kept_of,
    one_hot,
    removals_of,
    removed_of,
    varied_matrices,
    varied_sets,
)
from rerail.compress.templates.set_searcher import SetSearcher
from rerail.errors import InputError
from rerail.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class EEP(SetSearcher):
    """The search over kept sets, and over what kept experts are made of.

    Attributes:
        population: random sets that are judged first.
        iterations, merging: children that are judged in phase 1 and 2; merging=0 leaves phase 2.
        crossover, from_front: probabilities of a second parent, and of a parent of the best fifth.
        mutation, scale, normalise: see above.
    """

    population: int = 30
    iterations: int = 40
    merging: int = 0
    crossover: float = 0.3
    from_front: float = 0.6
    mutation: float = 0.25
    scale: float = 0.065
    normalise: float = 0.1

    paper: ClassVar[str] = "arXiv 2407.00945"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("population", "iterations", "merging"):
            if getattr(self, name) < 0:
                raise InputError(f"compressor.{name}={getattr(self, name)} must be at least 0")

    def search(self, layers: Layers, first: Plan, fitness: Fitness) -> tuple[Plan, dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.seed)
        scopes = self.scopes(layers)
        kept = [first.layers[scope[0]].kept for scope in scopes]
        pools = [
            removals_of(layers[s[0]], own, generator) for s, own in zip(scopes, kept, strict=True)
        ]
        sets = self.evolution(lambda gone: fitness(self.keeping(layers, kept_of(gone))))
        sets.judge([removed_of(pools, kept)])
        sets.judge(tuple(pool.random(1)[0] for pool in pools) for _ in range(self.population))
        sets.run(lambda *pair: varied_sets(pools, *pair, self.mutation), self.iterations)
        best = kept_of(sets.best)
        if not self.merging:
            return self.keeping(layers, best), sets.summary()
        made = self.evolution(lambda matrices: fitness(self.made_of(layers, best, matrices)))
        made.judge([one_hot(pools, best)])
        steps = generator, self.mutation, self.scale, self.normalise
        made.run(lambda *pair: varied_matrices(*pair, *steps), self.merging)
        found = {**sets.summary(), "merged": made.summary()}
        return self.made_of(layers, best, made.best), found

    def evolution(self, fitness: Callable[[Genome], float]) -> Evolution:
        return Evolution(fitness, self.crossover, self.from_front, random.Random(self.seed))
