"""Basis form: every expert matrix is A_i f(sum_j alpha_ij B_j), with the bases B_j shared in the layer.

Symbols (for each factorised matrix, oriented p x d = I x H): A (E, p, r), alpha (E, m) with rows on
the simplex, B (m, r, d), f the activation. `down` (H, I) is factorised on its transpose.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.moe.bank import ExpertWeights, SolvedBank

ACTIVATIONS = {"silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x}


def mixed(a: Tensor, alpha: Tensor, b: Tensor, activation: str) -> Tensor:
    """Return A_i f(sum_j alpha_ij B_j) for all experts: (E, p, r), (E, m), (m, r, d) -> (E, p, d)."""
    return a @ ACTIVATIONS[activation](torch.einsum("em,mrd->erd", alpha, b))


class Bank(SolvedBank):
    """The basis bank; `spec.options["matrices"]` is `gate+up` or `gate+up+down`."""

    def untouched(self) -> set[str]:
        """Down stays dense unless it is factorised; biases always do."""
        touched = {"gate_up_proj"}
        if "down" in self.spec.options["matrices"].split("+"):
            touched.add("down_proj")
        return {n for n in self.shell._parameters if n not in touched}

    def expand(self) -> dict[str, Tensor]:
        """Return fused tensors in the model's dtype."""
        parts = {n: self._matrix(n) for n in self.spec.options["matrices"].split("+")}
        down = parts["down"].mT if "down" in parts else parts["gate"].mT
        packed = self.layout.pack(ExpertWeights(parts["gate"], parts["up"], down))
        if "down" not in parts:
            del packed["down_proj"]
        return packed

    def _matrix(self, name: str) -> Tensor:
        a, alpha, b = (self.solved(f"{name}.{part}") for part in ("A", "alpha", "B"))
        return mixed(a, alpha, b, self.spec.options["activation"])
