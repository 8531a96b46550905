"""Solved form: P whole experts that a method computed, kept as the fused tensors they are.

Solved tensors bear the family's own parameter names (biases included) and shapes, with P in the
place of E; `spec.integers` names the shape of one expert's part of each.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from rerail.experts.base import BankSpec, ExpertBank, Stored
from rerail.moe.fused_experts import Dims, expert_parameters, shell_of


class Bank(ExpertBank):
    """Whole experts from the plan's tensors, in the dtype of those that they replace."""

    def __init__(
        self,
        spec: BankSpec,
        slots: Sequence[int],
        layer: int,
        stocks: Mapping[int, nn.Module],
        tensors: Mapping[str, Tensor],
    ):
        stock = stocks[layer]
        super().__init__(spec, slots, layer, stock)
        held = expert_parameters(stock)
        solved = {
            name: tensor.detach().to(held[name], copy=True) for name, tensor in tensors.items()
        }
        self.shell = shell_of(stock, solved, spec.stored)

    @staticmethod
    def predicted(spec: BankSpec, layer: int, dims: Dims) -> Stored:  # noqa: ARG004
        """Return P times the numbers of one expert, by tensor."""
        return {(layer, n): spec.stored * math.prod(spec.each(n)) for n in spec.integers}

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        """Return the shape of every fused tensor; a flat one where the plan's has another size."""
        given = {name: spec.each(name) for name in spec.integers}
        fits = {n: math.prod(given[n]) == count for n, count in dims.numbers.items() if n in given}
        return {
            name: (spec.stored, *(given[name] if fits.get(name) else (count,)))
            for name, count in dims.numbers.items()
        }

    def dense(self) -> dict[str, Tensor]:
        """Return the fused tensors with leading axis P."""
        return dict(expert_parameters(self.shell))

    def stored(self) -> Stored:
        """Count each tensor."""
        return {(self.layer, name): t.numel() for name, t in self.dense().items()}
