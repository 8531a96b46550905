"""Second moments of what goes into an expert (x), into its down projection (h), and of gradients.

h = act(gate) * up is the middle activation (I,). Sums of outer products are fp32 matrix products a
slot and batch, added up in float64. On a GPU vectors of bfloat16 are multiplied as they are with
sums in fp32: each product of two of them is exact in fp32, so that nothing is lost, and the tensor
cores are ten times as fast.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.moe.model import MoELayer
from rerail.statistics.statistic import OutputGradientStatistic, RoutedStatistic, RoutedTokens


class Grams(RoutedStatistic):
    """Sums of outer products, symmetric along the last two axes."""

    @abstractmethod
    def rows(self, tokens: RoutedTokens) -> Iterator[tuple[int, Tensor]]:
        """Yield a row of axis 0 and the vectors (n, D) that belong to it, in the model's dtype."""

    def measure(self, tokens: RoutedTokens) -> Tensor:
        return self.update(self.zeros(tokens.sizes), tokens)

    def update(self, state: Tensor, tokens: RoutedTokens) -> Tensor:
        """Add this batch to `state`, in place."""
        rows = state if state.dim() == 3 else state.unsqueeze(0)
        for e, vectors in self.rows(tokens):
            rows[e] += gram(vectors).to(state.device)
        return state

    def is_finite(self, tensor: Tensor) -> bool:
        """Look at the diagonal: it is not finite where any entry is not."""
        return bool(torch.isfinite(tensor.diagonal(dim1=-2, dim2=-1)).all())


def gram(vectors: Tensor) -> Tensor:
    """Return sum_n v_n v_n^T (D, D) of vectors (n, D), in float32."""
    if vectors.device.type == "cuda" and vectors.dtype == torch.bfloat16:
        return torch.mm(vectors.T, vectors, out_dtype=torch.float32)
    vectors = vectors.float()
    return vectors.T @ vectors


@dataclass(frozen=True)
class InputMoment(Grams):
    """sum over X_e of x x^T. float64 (E, H, H)."""

    axes = "E H H"

    def rows(self, tokens: RoutedTokens) -> Iterator[tuple[int, Tensor]]:
        for e, chosen, _ in tokens.by_expert():
            yield e, tokens.hidden[chosen]


@dataclass(frozen=True)
class MiddleMoment(Grams):
    """sum over X_e of g^a h h^T. float64 (E, I, I)."""

    axes = "E I I"
    needs = frozenset({"middle"})

    gate_power: int = 0

    @property
    def name(self) -> str:
        return f"middle_moment_g{self.gate_power}"

    def rows(self, tokens: RoutedTokens) -> Iterator[tuple[int, Tensor]]:
        """Yield each slot's middle activations, times the root of g^a."""
        assert tokens.middle is not None
        if not self.gate_power:
            yield from ((e, run) for e, (run,) in tokens.runs(tokens.sorted(tokens.middle)))
            return
        gates = tokens.sorted_gates.abs() ** (self.gate_power / 2)
        for e, (middle, g) in tokens.runs(tokens.sorted_middle, gates):
            yield e, g * middle


@dataclass(frozen=True)
class LogitGram(Grams):
    """sum over all tokens of z z^T, z (E,) the logits, 0 where a mask is. float64 (E, E)."""

    axes = "E E"
    needs = frozenset({"logits"})

    def rows(self, tokens: RoutedTokens) -> Iterator[tuple[int, Tensor]]:
        assert tokens.logits is not None
        logits = tokens.logits.float()
        yield 0, logits.masked_fill(torch.isneginf(logits), 0.0)


@dataclass(frozen=True)
class LayerMoment(Grams):
    """sum over all tokens of x x^T, whatever experts they chose. float64 (H, H)."""

    axes = "H H"

    def rows(self, tokens: RoutedTokens) -> Iterator[tuple[int, Tensor]]:
        yield 0, tokens.hidden


@dataclass(frozen=True)
class PooledMiddleMoment(Grams):
    """sum over experts and X_e of h h^T. float64 (I, I)."""

    axes = "I I"
    needs = frozenset({"middle"})

    def rows(self, tokens: RoutedTokens) -> Iterator[tuple[int, Tensor]]:
        assert tokens.middle is not None
        yield 0, tokens.middle.flatten(0, 1)


@dataclass(frozen=True)
class OutputGradientMoment(OutputGradientStatistic):
    """sum over experts and X_e of d d^T, d = dL / dy of a matrix's output y = W x (before biases).

    L is the sequence's mean next-token loss; `matrix` is gate, up (float64 (I, I)) or down (H, H).
    """

    matrix: str

    def empty(self, layer: MoELayer) -> Tensor:
        size = layer.dims.matrices[self.matrix][0]
        return torch.zeros(size, size, dtype=self.dtype)

    def update(self, state: Tensor, matrix: str, gradient: Tensor) -> None:
        if matrix == self.matrix:
            state += gram(gradient).to(state.device)
