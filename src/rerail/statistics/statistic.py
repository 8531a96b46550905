"""A statistic: one tensor a layer, with its pass and the way two shards of it merge."""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from rerail.moe.model import MoELayer

PassName = Literal["routed", "dense", "backward", "ablation"]
Need = Literal["norms", "outputs", "middle", "logits", "scores", "residual", "stream"]


@dataclass(frozen=True, kw_only=True)
class RoutedTokens:
    """The valid tokens of one batch at one layer, as the router sent them.

    What no statistic needs is None.

    Attributes:
        hidden: (T, H) input of the experts.
        index: (T, K) chosen slots.
        gates: (T, K) weights really multiplied into the outputs.
        num_experts: E.
        norms: (T, K) euclidean norm of each chosen expert's output, before the gate (`norms`).
        outputs: (T, K, H) each chosen expert's output, before the gate (`outputs`).
        routed: (T, H) the layer's routed output, sum_k gates * outputs (`outputs`).
        middle: (T, K, I) act(gate) * up in each chosen expert (`middle`).
        logits: (T, E) router logits; -inf where a mask silenced a slot (`logits`).
        scores: (T, E) the router's scores before top-k, without bias or scaling (`scores`).
        residual: (T, H) the residual stream before the MoE sub-layer's norm (`residual`).
        stream: (T, H) twice, the residual stream into and out of the decoder layer (`stream`).
        position: int64 (T,) place of the token in the text: block * S + offset.
        block: S, the tokens of a block of the text, padding included.
    """

    hidden: Tensor
    index: Tensor
    gates: Tensor
    num_experts: int
    norms: Tensor | None = None
    outputs: Tensor | None = None
    routed: Tensor | None = None
    middle: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None
    residual: Tensor | None = None
    stream: tuple[Tensor, Tensor] | None = None
    position: Tensor | None = None
    block: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the axes E, H and, where `middle` is there, I."""
        sizes = {"E": self.num_experts, "H": self.hidden.shape[1]}
        return sizes if self.middle is None else sizes | {"I": self.middle.shape[-1]}

    def sum_by_expert(self, values: Tensor) -> Tensor:
        """Return float64 (E,) or (E, D): values (T, K) or (T, K, D) added up by chosen slot."""
        if values.dim() == 3:
            return self.sum_runs(lambda run: run, self.sorted(values))
        flat, values = self.index.flatten(), values.double().flatten()
        if flat.device.type == "cuda":
            # bincount waits for the GPU there, and adds in no fixed order
            return self._one_hot.double() @ values
        return torch.bincount(flat, values, minlength=self.num_experts)

    def count_by_expert(self) -> Tensor:
        """Return int64 (E,): how many tokens chose each slot."""
        if self.index.device.type == "cuda":
            return self._one_hot.sum(dim=1)
        return torch.bincount(self.index.flatten(), minlength=self.num_experts)

    def by_expert(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each slot that was chosen, and the (token, choice) indices that chose it."""
        for e, (tokens, choices) in self.runs(*self._order):
            yield e, tokens, choices

    def sorted(self, values: Tensor) -> Tensor:
        """Return the pairs (T, K, ...) as (T * K, ...), sorted by slot and in it by token."""
        return values[self._order]

    def runs(self, *pairs: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Yield each slot that was chosen, and its run of each of the sorted pairs (T * K, ...)."""
        parts = zip(*(torch.split(p, self._counts) for p in pairs), strict=True)
        return ((e, runs) for e, runs in enumerate(parts) if len(runs[0]))

    def sum_runs(self, share: Callable[..., Tensor], *pairs: Tensor) -> Tensor:
        """Return float64 (E, D): what `share` makes of each slot's runs, (n, D), added up.

        One run at a time, so that what `share` makes stays in the cache.
        """
        out = pairs[0].new_zeros(self.num_experts, pairs[0].shape[-1], dtype=torch.float64)
        for e, runs in self.runs(*pairs):
            out[e] = share(*runs).sum(dim=0, dtype=torch.float64)
        return out

    @cached_property
    def sorted_gates(self) -> Tensor:
        """Gate weights as sorted pairs, float32 (T * K, 1)."""
        return self.sorted(self.gates).float().unsqueeze(1)

    @cached_property
    def sorted_outputs(self) -> Tensor:
        """Outputs before the gate as sorted pairs, float32 (T * K, H)."""
        assert self.outputs is not None
        return self.sorted(self.outputs).float()

    @cached_property
    def sorted_middle(self) -> Tensor:
        """Middle activations as sorted pairs, float32 (T * K, I)."""
        assert self.middle is not None
        return self.sorted(self.middle).float()

    @cached_property
    def _counts(self) -> list[int]:
        return self.count_by_expert().tolist()

    @cached_property
    def _one_hot(self) -> Tensor:
        """Bool (E, T * K): whether a choice is of this slot."""
        slots = torch.arange(self.num_experts, device=self.index.device)
        return slots.unsqueeze(1) == self.index.flatten()

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor]:
        # stable: within a slot tokens keep their order, so that sums are the same in every run
        order, k = self.index.flatten().argsort(stable=True), self.index.shape[1]
        return order // k, order % k


class Statistic(ABC):
    """A frozen dataclass that knows its pass, how shards merge, its shape and its update.

    Attributes:
        pass_name: the pass that fills it.
        merges_by: how two shards become one.
        axes: the shape of a layer's tensor, in letters: E slots, H hidden, I intermediate.
        dtype: sums are kept in float64 or int64.
    """

    pass_name: ClassVar[PassName]
    merges_by: ClassVar[Literal["add", "max", "sample"]] = "add"
    axes: ClassVar[str] = ""
    dtype: ClassVar[torch.dtype] = torch.float64

    @property
    def name(self) -> str:
        """A file-safe name: that of the class in snake case, and the settings."""
        # an underscore before each capital but the first
        words = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        settings = dataclasses.asdict(cast(Any, self)).values()
        short = (f"{v:g}" if isinstance(v, float) else str(v) for v in settings)
        return "_".join([words, *short])

    def empty(self, layer: MoELayer) -> Tensor:
        """Return the tensor of zero tokens."""
        sizes = {"E": layer.num_experts, "H": layer.hidden_size, "I": layer.intermediate_size}
        return self.zeros(sizes)

    def zeros(self, sizes: Mapping[str, int]) -> Tensor:
        """Return zeros of the statistic's shape, for the size of each axis."""
        return torch.zeros([sizes[axis] for axis in self.axes.split()], dtype=self.dtype)

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Return two shards merged; never means of means."""
        return a + b if self.merges_by == "add" else torch.maximum(a, b)

    def is_finite(self, tensor: Tensor) -> bool:
        """Return whether no entry is infinite or NaN."""
        return bool(torch.isfinite(tensor).all())


class RoutedStatistic(Statistic):
    """A statistic of tokens at the experts that they were routed to."""

    pass_name: ClassVar[PassName] = "routed"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def needed(self) -> frozenset[Need]:
        """Return what `measure` reads beyond inputs, slots and gates."""
        return self.needs

    @abstractmethod
    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Return this batch's share, to be merged."""

    def update(self, state: Tensor, tokens: RoutedTokens) -> Tensor:
        """Return `state` with this batch merged in; large statistics add in place."""
        return self.merge(state, self.measure(tokens).to(state.device))


class DenseStatistic(Statistic):
    """A statistic of every expert on every token (E / K times the experts' cost)."""

    pass_name: ClassVar[PassName] = "dense"

    @abstractmethod
    def measure(self, expert: int, hidden: Tensor, output: Tensor) -> Tensor:
        """Return one expert's share for inputs (T, H) and outputs (T, H): a slice along axis 0."""


class BackwardStatistic(Statistic):
    """A statistic of the gradient of each sequence's mean next-token loss."""

    pass_name: ClassVar[PassName] = "backward"

    @abstractmethod
    def update(self, state: Tensor, expert: int, name: str, gradient: Tensor) -> None:
        """Add one sequence's gradient of one slot's fused tensor `name` to `state`, in place."""


class OutputGradientStatistic(Statistic):
    """A statistic of the same gradient in what each matrix of any slot makes."""

    pass_name: ClassVar[PassName] = "backward"

    @abstractmethod
    def update(self, state: Tensor, matrix: str, gradient: Tensor) -> None:
        """Add one sequence's gradients (n, out) of `gate`, `up` or `down` to `state`, in place."""


class AblationStatistic(Statistic):
    """A statistic of the loss without one slot."""

    pass_name: ClassVar[PassName] = "ablation"

    @abstractmethod
    def measure(self, plain: float, without: float, tokens: int) -> Tensor:
        """Return one slot's share for the summed losses of a batch: a slice along axis 0."""


Filled = dict[Statistic, Tensor]  # the statistics of one layer


class UndeclaredError(KeyError):
    """A compressor read a statistic that it does not require."""


@dataclass(frozen=True)
class StatisticSet:
    """Filled statistics: layer index -> statistic name -> tensor."""

    tensors: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def of(self, layer: MoELayer, required: Iterable[Statistic]) -> "LayerStatistics":
        """Return the view that a compressor gets: the required statistics of one layer."""
        return LayerStatistics(self.tensors.get(layer.index, {}), tuple(required))

    def merge(self, other: "StatisticSet", statistics: Iterable[Statistic]) -> "StatisticSet":
        """Return these and another shard's statistics as those of both texts."""
        wanted = tuple(statistics)
        return StatisticSet(
            {
                i: {s.name: s.merge(own[s.name], other.tensors[i][s.name]) for s in wanted}
                for i, own in self.tensors.items()
            }
        )


def join_sets(sets: Iterable[StatisticSet]) -> StatisticSet:
    """Return one set of the different statistics of several sets of the same layers and text."""
    tensors: dict[int, dict[str, Tensor]] = {}
    for part in sets:
        for index, of_layer in part.tensors.items():
            tensors.setdefault(index, {}).update(of_layer)
    return StatisticSet(tensors)


class LayerStatistics(Mapping[Statistic, Tensor]):
    """The declared statistics of one layer; reading another one raises."""

    def __init__(self, tensors: Mapping[str, Tensor], required: tuple[Statistic, ...]):
        self._tensors = tensors
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
        return self._tensors[statistic.name]

    def __iter__(self) -> Iterator[Statistic]:
        return iter(self._required)

    def __len__(self) -> int:
        return len(self._required)
