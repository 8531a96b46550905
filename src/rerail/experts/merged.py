"""Merged form: P whole experts that a method solved for, stored as fused tensors.

Solved tensors bear the family's own parameter names (biases included) and shapes, with P in the
place of E; `spec.integers` names the shape of one expert's part of each.
"""

import math

from rerail.experts.base import BankParts, BankSpec, ExpertBank, Stored
from rerail.moe.fused_experts import Dims, expert_parameters, shell_of


class MergedExperts(ExpertBank):
    """Whole experts from the plan's tensors, in the dtype of those that they replace."""

    def __init__(self, parts: BankParts):
        super().__init__(parts)
        own = expert_parameters(parts.stock)
        solved = {name: t.detach().to(own[name], copy=True) for name, t in parts.tensors.items()}
        self.shell = shell_of(parts.stock, solved, parts.spec.stored)

    @classmethod
    def predicted(cls, spec: BankSpec, layer: int, dims: Dims) -> Stored:  # noqa: ARG003
        return {(layer, n): spec.stored * math.prod(spec.each(n)) for n in spec.integers}

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        """Return the shape of every fused tensor; a flat one where the plan's has another size."""
        shapes = {}
        for name, count in dims.numbers.items():
            fits = name in spec.integers and math.prod(spec.each(name)) == count
            shapes[name] = (spec.stored, *(spec.each(name) if fits else (count,)))
        return shapes

    def stored(self) -> Stored:
        return {(self.layer, name): t.numel() for name, t in self.dense().items()}
