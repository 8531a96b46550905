"""Factorisers: all experts stay, as solved tensors. Open: `factor`, or `moments` and `ranks`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from rerail.compress.base import Compressor, Decision, untouched
from rerail.compress.solvers.ranks import Ranks, ranks_within
from rerail.compress.solvers.whitening import Moments, layer_moments, low_rank
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.plan.budget import dense_numbers, numbers_kept
from rerail.statistics.statistic import LayerStatistics

# sizes of a form by name: an int, or a tuple with one for each expert
Integers = Mapping[str, Any]
Factors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Factoriser(Compressor):
    """Stores solved tensors for all experts of a layer; a count is of numbers that it may store.

    A layer that may store all of its numbers stays as it is.

    Attributes:
        run: `stored` computes from the solved tensors; `materialised` keeps whole experts too.
    """

    run: Literal["stored", "materialised"] = "stored"

    paradigm: ClassVar[str] = "editing"
    allocations: ClassVar[Literal["any", "fixed", "uniform"]] = "fixed"

    @property
    def written_out(self) -> Literal["no", "yes", "never"]:
        return "yes"

    def sizes(
        self, layer: MoELayer, max_numbers: int, statistics: LayerStatistics | None = None
    ) -> Integers:
        """Return the integers of the form for at most so many numbers, by default its ranks.

        Without statistics (before any are known) it only says whether they are enough.

        Raises:
            OutOfReach: nothing fits.
        """
        scores = {} if statistics is None else self.scores(layer, statistics)
        return ranks_within(layer, max_numbers, *self.ranks(layer), scores)

    def ranks(self, layer: MoELayer) -> tuple[int, dict[str, Ranks]]:
        """Return the numbers stored whatever the ranks, and the ranks to be chosen by matrix type.

        By default each matrix has a rank of its own, r (out + in) numbers; biases stay.
        """
        n, p, d, _ = layer.dims
        biases = dense_numbers(layer) - 3 * n * p * d
        return biases, {name: Ranks(p + d, min(p, d), n) for name in ("gate", "up", "down")}

    def scores(self, layer: MoELayer, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return how ranks compare, (E,) by matrix type; equal by default."""
        return {}

    def moments(self, layer: MoELayer, statistics: LayerStatistics) -> dict[str, Moments]:
        """Return what errors are weighed by, by matrix type; by default by nothing."""
        return layer_moments(layer, statistics, False, 0.0, 0.0)

    def factor(self, layer: MoELayer, statistics: LayerStatistics, sizes: Integers) -> Factors:
        """Return the solved tensors, by default the best U and V of each expert's own matrices."""
        moments, tensors = self.moments(layer, statistics), Factors()
        for name, stack in layer.stack()._asdict().items():
            u, v = low_rank(stack, moments[name], sizes[name])
            tensors |= {f"{name}.U": u, f"{name}.V": v}
        return tensors

    def solve(
        self, layer: MoELayer, statistics: LayerStatistics, max_numbers: int
    ) -> tuple[Integers, Factors]:
        """Return the integers and the solved tensors, by default one after the other."""
        sizes = self.sizes(layer, max_numbers, statistics)
        return sizes, self.factor(layer, statistics, sizes)

    def spec(self, layer: MoELayer, sizes: Integers) -> BankSpec:
        """Return the stored form; by default low rank with rows of each expert's own."""
        return BankSpec("low_rank", layer.num_experts, (), dict(sizes), {"rows": "own"})

    def count(self, layer: MoELayer, removed: float) -> int:
        return self.reached(layer, numbers_kept(dense_numbers(layer), removed))

    def reached(self, layer: MoELayer, max_numbers: int) -> int:
        """Return the count, once sizes were found for a layer that changes.

        Raises:
            OutOfReach: nothing fits.
        """
        if max_numbers != dense_numbers(layer):
            self.sizes(layer, max_numbers)
        return max_numbers

    def decide_layer(
        self, layer: MoELayer, statistics: LayerStatistics, count: int
    ) -> Decision | None:
        if count == dense_numbers(layer):
            return None
        sizes, tensors = self.solve(layer, statistics, count)
        spec = self.spec(layer, sizes)
        if self.run != "stored":
            spec = dataclasses.replace(spec, options={**spec.options, "run": self.run})
        return Decision(untouched(layer, spec), tensors)
