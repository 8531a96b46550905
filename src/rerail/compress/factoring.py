"""Factorisers: every expert is kept, its matrices are stored as solved tensors. Open: `factor`."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rerail.compress.compressor import Compressor, ScopePlan
from rerail.errors import OutOfReach
from rerail.moe.bank import BankSpec
from rerail.moe.layer import MoELayer
from rerail.plan.allocation import Allocation, Uniform
from rerail.plan.plan import LayerPlan
from rerail.plan.ratio import Ratio
from rerail.stats.statistic import LayerStatistics, StatisticSet


@dataclass(frozen=True, kw_only=True)
class Factoriser(Compressor):
    """Stores solved tensors for all experts of a layer; a share is how many numbers it may store.

    Allocation is uniform: every layer gets the same share of its numbers.
    """

    paradigm: ClassVar[str] = "editing"

    @abstractmethod
    def sizes(self, layer: MoELayer, budget: int) -> Mapping[str, int]:
        """Return the integers of the form (ranks, bases) for at most `budget` numbers.

        Raises:
            OutOfReach: nothing fits.
        """

    @abstractmethod
    def factor(
        self, layer: MoELayer, statistics: LayerStatistics, sizes: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Return the solved tensors."""

    @abstractmethod
    def spec(self, layer: MoELayer, sizes: Mapping[str, int]) -> BankSpec:
        """Return the stored form."""

    def check(self, layers: Sequence[MoELayer], ratio: Ratio, allocation: Allocation) -> None:
        """Find sizes for every layer, or say why not."""
        if not isinstance(allocation, Uniform):
            raise OutOfReach(
                f"allocation {allocation} counts experts, and {type(self).__name__} keeps them "
                "all; use allocation=uniform"
            )
        for layer in layers:
            self.sizes(layer, ratio.numbers_kept(layer))

    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Ratio,
        allocation: Allocation,
    ) -> list[int]:
        """Return the numbers that each layer may store."""
        return [ratio.numbers_kept(layer) for layer in layers]

    def plan_scope(
        self,
        layers: Sequence[MoELayer],
        statistics: Sequence[LayerStatistics],
        shares: Sequence[int],
    ) -> ScopePlan:
        """Solve each layer."""
        parts = []
        tensors: dict[str, Tensor] = {}
        for layer, held, share in zip(layers, statistics, shares, strict=True):
            sizes = self.sizes(layer, share)
            solved = self.factor(layer, held, sizes)
            tensors |= {f"{layer.index}.{name}": t for name, t in solved.items()}
            everyone = tuple(range(layer.num_experts))
            spec = self.spec(layer, sizes)
            parts.append(LayerPlan(layer.index, everyone, everyone, "untouched", spec))
        return ScopePlan(tuple(parts), tensors)
