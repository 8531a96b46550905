"""A statistic: one tensor a layer, with its pass and the way two shards of it merge."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rerail.moe.layer import MoELayer


@dataclass(frozen=True)
class RoutedTokens:
    """The valid tokens of one batch at one layer, as the router sent them.

    Attributes:
        hidden: (T, H) input of the experts.
        index: (T, K) chosen slots.
        gates: (T, K) weights really multiplied into the outputs.
        norms: (T, K) euclidean norm of each chosen expert's output, before the gate; None where no
            statistic asked for outputs.
        num_experts: E.
    """

    hidden: Tensor
    index: Tensor
    gates: Tensor
    norms: Tensor | None
    num_experts: int

    def sum_by_expert(self, values: Tensor) -> Tensor:
        """Return float64 (E,): values (T, K) added up by chosen slot."""
        flat = values.double().flatten()
        return torch.bincount(self.index.flatten(), flat, minlength=self.num_experts)


class Statistic(ABC):
    """A frozen dataclass that knows its name, pass, merge, shape and update."""

    merge: ClassVar[Literal["add", "max"]] = "add"

    @property
    @abstractmethod
    def name(self) -> str:
        """A file-safe name that includes the settings."""

    @abstractmethod
    def empty(self, layer: MoELayer) -> Tensor:
        """Return the tensor of zero tokens."""

    def merged(self, a: Tensor, b: Tensor) -> Tensor:
        """Merge two shards; sums are kept in float64 or int64, never means of means."""
        return a + b if self.merge == "add" else torch.maximum(a, b)


class RoutedStatistic(Statistic):
    """A statistic of tokens at the experts that they were routed to."""

    needs_outputs: ClassVar[bool] = False

    @abstractmethod
    def of(self, tokens: RoutedTokens) -> Tensor:
        """Return this batch's share, to be merged."""


class DenseStatistic(Statistic):
    """A statistic of every expert on every token (E / K times the experts' cost)."""

    @abstractmethod
    def of(self, expert: int, hidden: Tensor, output: Tensor) -> Tensor:
        """Return one expert's share for inputs (T, H) and outputs (T, H): a slice along axis 0."""


class UndeclaredError(KeyError):
    """A compressor read a statistic that it does not require."""


@dataclass(frozen=True)
class StatisticSet:
    """Filled statistics: layer index -> statistic name -> tensor, with their lineage."""

    tensors: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)

    def of(self, layer: MoELayer, required: Iterable[Statistic]) -> "LayerStatistics":
        """Return the view that a compressor gets: the required statistics of one layer."""
        return LayerStatistics(self.tensors.get(layer.index, {}), tuple(required))

    def merged(self, other: "StatisticSet", statistics: Iterable[Statistic]) -> "StatisticSet":
        """Merge two shards of the same statistics."""
        return StatisticSet(
            {
                i: {s.name: s.merged(held[s.name], other.tensors[i][s.name]) for s in statistics}
                for i, held in self.tensors.items()
            },
            self.lineage,
        )


class LayerStatistics(Mapping[Statistic, Tensor]):
    """The declared statistics of one layer; reading another one raises."""

    def __init__(self, held: Mapping[str, Tensor], required: tuple[Statistic, ...]):
        self._held = held
        self._required = required
        self.read: set[Statistic] = set()

    def __getitem__(self, statistic: Statistic) -> Tensor:
        """Return a statistic's tensor.

        Raises:
            UndeclaredError: the compressor's `requires` does not name it.
        """
        if statistic not in self._required:
            raise UndeclaredError(f"{statistic.name} is not among the required statistics")
        self.read.add(statistic)
        return self._held[statistic.name]

    def __iter__(self) -> Iterator[Statistic]:
        """Iterate over the required statistics."""
        return iter(self._required)

    def __len__(self) -> int:
        """Return how many are required."""
        return len(self._required)
