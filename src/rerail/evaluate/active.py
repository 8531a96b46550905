"""How many experts are really computed for a token: fewer than K where slots are skipped."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rerail.experts.base import bank_of
from rerail.moe.model import MoELayer, MoEModel


@dataclass
class Active:
    """Counts over all valid tokens, layer by layer.

    Attributes:
        experts: layer index -> experts computed.
        tokens: layer index -> tokens seen.
        mask: (B, S) of the batch in flight; None where all is valid.
    """

    experts: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    mask: Tensor | None = None

    @classmethod
    def of_all(cls, parts: Sequence["Active"]) -> "Active":
        """Return the counts of several parts of a text."""
        layers = parts[0].experts
        return cls(
            {i: sum(part.experts[i] for part in parts) for i in layers},
            {i: sum(part.tokens[i] for part in parts) for i in layers},
        )

    def of(self, layer: int) -> float:
        """Return the experts computed for a token of a layer, on average."""
        return self.experts[layer] / max(1, self.tokens[layer])

    @property
    def mean(self) -> float:
        """The mean over the layers."""
        return sum(map(self.of, self.experts)) / len(self.experts)


def _counter(layer: MoELayer, counts: Active) -> Any:
    """Return a forward hook for a layer's experts."""
    counts.experts[layer.index] = counts.tokens[layer.index] = 0

    def count(experts: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        index, active = inputs[1], bank_of(experts).active
        active = index.new_full((len(index),), index.shape[1]) if active is None else active
        if counts.mask is not None:
            active = active[counts.mask.flatten().to(active.device)]
        counts.experts[layer.index] += int(active.sum())
        counts.tokens[layer.index] += len(active)

    return count


@contextlib.contextmanager
def counting(model: MoEModel) -> Iterator[Active]:
    """Count the experts of every forward inside the block."""
    counts = Active()
    hooks = [la.experts.register_forward_hook(_counter(la, counts)) for la in model.layers]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
        counts.mask = None
