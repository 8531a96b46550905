"""Second moments of what goes into an expert (x) and into its down projection (h).

h = act(gate) * up is the middle activation (I,). Sums of outer products are fp32 matrix products a
slot and batch, added up in float64.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerail.moe.model import MoELayer
from rerail.statistics.statistic import Need, RoutedStatistic, RoutedTokens


class Grams(RoutedStatistic):
    """Sums of outer products, symmetric along the last two axes."""

    @abstractmethod
    def rows(self, tokens: RoutedTokens) -> Iterator[tuple[int, Tensor]]:
        """Yield a row of axis 0 and the float32 vectors (n, D) that belong to it."""

    @abstractmethod
    def shape(self, tokens: RoutedTokens) -> tuple[int, ...]:
        """Return the shape of a share."""

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Add up this batch."""
        return self.update(torch.zeros(*self.shape(tokens), dtype=torch.float64), tokens)

    def update(self, state: Tensor, tokens: RoutedTokens) -> Tensor:
        """Add this batch to `state`, in place."""
        rows = state if state.dim() == 3 else state.unsqueeze(0)
        width = state.shape[-1]
        product = tokens.hidden.new_empty(width, width, dtype=torch.float32)
        for e, vectors in self.rows(tokens):
            torch.mm(vectors.T, vectors, out=product)
            rows[e] += product.to(state.device)
        return state

    def is_finite(self, tensor: Tensor) -> bool:
        """Look at the diagonal: it is not finite where any entry is not."""
        return bool(torch.isfinite(tensor.diagonal(dim1=-2, dim2=-1)).all())


@dataclass(frozen=True)
class InputMoment(Grams):
    """sum over X_e of x x^T. float64 (E, H, H)."""

    @property
    def name(self) -> str:
        """`input_moment`."""
        return "input_moment"

    def empty(self, layer: MoELayer) -> Tensor:
        """Return float64 zeros (E, H, H)."""
        h = layer.hidden_size
        return torch.zeros(layer.num_experts, h, h, dtype=torch.float64)

    def shape(self, tokens: RoutedTokens) -> tuple[int, ...]:
        """Return (E, H, H)."""
        h = tokens.hidden.shape[1]
        return tokens.num_experts, h, h

    def rows(self, tokens: RoutedTokens) -> Iterator[tuple[int, Tensor]]:
        """Yield each slot's inputs."""
        for e, chosen, _ in tokens.by_expert():
            yield e, tokens.hidden[chosen].float()


@dataclass(frozen=True)
class MiddleMoment(Grams):
    """sum over X_e of g^a h h^T. float64 (E, I, I)."""

    gate_power: int = 0

    needs: ClassVar[frozenset[Need]] = frozenset({"middle"})

    @property
    def name(self) -> str:
        """`middle_moment_g<a>`."""
        return f"middle_moment_g{self.gate_power}"

    def empty(self, layer: MoELayer) -> Tensor:
        """Return float64 zeros (E, I, I)."""
        i = layer.intermediate_size
        return torch.zeros(layer.num_experts, i, i, dtype=torch.float64)

    def shape(self, tokens: RoutedTokens) -> tuple[int, ...]:
        """Return (E, I, I)."""
        assert tokens.middle is not None
        i = tokens.middle.shape[-1]
        return tokens.num_experts, i, i

    def rows(self, tokens: RoutedTokens) -> Iterator[tuple[int, Tensor]]:
        """Yield each slot's middle activations, times the root of g^a."""
        gates = tokens.sorted_gates.abs() ** (self.gate_power / 2)
        for e, (middle, g) in tokens.runs(tokens.sorted_middle, gates):
            yield e, g * middle if self.gate_power else middle
