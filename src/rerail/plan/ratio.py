"""Ratios and allocators: from a removed share to exact per-layer counts, and back to sizes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rerail.errors import InputError
from rerail.moe.layer import MoELayer, MoEModel


@dataclass(frozen=True)
class Ratio:
    """Removed share of the bytes of routed experts in the checkpoint's dtype.

    Attributes:
        removed: in [0, 1).
        counts: what the share is of; `routed` experts.
    """

    removed: float
    counts: str = "routed"

    def __post_init__(self) -> None:
        """Check the interval."""
        if not 0 <= self.removed < 1:
            raise InputError(
                f"ratio {self.removed} is outside [0, 1): it is the removed share of routed experts"
            )
        if self.counts != "routed":
            raise InputError(f"ratio counts {self.counts!r}, which is not known; allowed: 'routed'")

    def experts_removed(self, layer: MoELayer) -> int:
        """Return int(E * ratio), as REAP counts; exact where integers allow, else rounded down."""
        return math.floor(layer.num_experts * self.removed + 1e-9)


@dataclass(frozen=True)
class Sizes:
    """What a model weighs, counted from its tensors.

    Attributes:
        total: numbers in the checkpoint.
        routed: numbers in stored routed experts.
        active: numbers used for one token.
        itemsize: bytes a number in the checkpoint's dtype.
    """

    total: int
    routed: int
    active: int
    itemsize: int

    @classmethod
    def of(cls, model: MoEModel, itemsize: int) -> "Sizes":
        """Count a model."""
        counted = (model.parameters_total(), model.parameters_routed(), model.parameters_active())
        return cls(*counted, itemsize)

    @property
    def bytes(self) -> int:
        """Bytes of the checkpoint."""
        return self.total * self.itemsize

    def removed_of_experts(self, teacher: "Sizes") -> float:
        """Return the removed share of routed experts."""
        return 1 - self.routed / teacher.routed

    def removed_of_model(self, teacher: "Sizes") -> float:
        """Return the removed share of the whole model."""
        return 1 - self.total / teacher.total


class Allocation(ABC):
    """Says how many experts each layer keeps."""

    @abstractmethod
    def keep(
        self, layers: Sequence[MoELayer], ratio: Ratio, scores: Sequence[torch.Tensor] | None
    ) -> list[int]:
        """Return the kept count of each layer, at least top_k.

        Args:
            layers: the layers that are compressed.
            ratio: the removed share.
            scores: one (E,) tensor a layer, higher means keep, where a method has them.
        """


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every layer keeps the same share."""

    def keep(
        self, layers: Sequence[MoELayer], ratio: Ratio, scores: Sequence[torch.Tensor] | None
    ) -> list[int]:
        """Return E - int(E * ratio) for each layer."""
        return [layer.num_experts - ratio.experts_removed(layer) for layer in layers]


@dataclass(frozen=True)
class GlobalScore(Allocation):
    """Scores compete across layers; every layer keeps at least top_k (and `floor`).

    Scores are divided by their layer's sum first, as SEER-MoE and M-SMoE rank shares.
    """

    floor: int = 1

    def keep(
        self, layers: Sequence[MoELayer], ratio: Ratio, scores: Sequence[torch.Tensor] | None
    ) -> list[int]:
        """Return counts that sum to exactly the uniform total."""
        if scores is None:
            raise InputError(
                "allocation 'global' ranks scores, which this compressor has none of; use uniform or per_layer"
            )
        total = sum(Uniform().keep(layers, ratio, None))
        least = [max(self.floor, layer.top_k) for layer in layers]
        if sum(least) > total:
            raise InputError(
                f"allocation 'global' cannot keep {total} experts with at least {least} a layer"
            )
        ranked = [
            (float(s), i, r)
            for i, score in enumerate(scores)
            for r, s in enumerate(torch.sort(score / score.sum(), descending=True).values)
            if r >= least[i]
        ]
        counts = list(least)
        for _, i, _ in sorted(ranked, key=lambda entry: (-entry[0], entry[1], entry[2]))[
            : total - sum(least)
        ]:
            counts[i] += 1
        return counts


@dataclass(frozen=True)
class PerLayer(Allocation):
    """An explicit list of kept counts."""

    kept: tuple[int, ...] = ()

    def keep(
        self, layers: Sequence[MoELayer], ratio: Ratio, scores: Sequence[torch.Tensor] | None
    ) -> list[int]:
        """Return the list as given."""
        if len(self.kept) != len(layers):
            raise InputError(
                f"allocation.kept has {len(self.kept)} entries; the model has {len(layers)} MoE layers"
            )
        return list(self.kept)


def check_kept(layers: Sequence[MoELayer], counts: Sequence[int], selectable: bool) -> None:
    """Check kept counts before anything heavy.

    Raises:
        InputError: a count is outside [1, E], or leaves fewer selectable rows than top_k.
    """
    for layer, count in zip(layers, counts, strict=True):
        least = layer.top_k if selectable else 1
        if not least <= count <= layer.num_experts:
            reach = 1 - least / layer.num_experts
            raise InputError(
                f"the ratio leaves {count} of {layer.num_experts} experts in layer {layer.index}, and "
                f"{least} are needed (top_k = {layer.top_k}); allowed ratios: 0 to {reach:.4g}"
            )
