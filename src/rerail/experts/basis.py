"""Basis form: an expert matrix is A_i f(sum_j alpha_ij B_j), the bases B_j shared in the layer.

Symbols (for each factorised matrix, oriented p x d = I x H): A (E, p, r), alpha (E, m) with rows on
the simplex, B (m, r, d), f the activation. `down` (H, I) is factorised on its transpose.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.errors import InputError
from rerail.experts.base import BankSpec
from rerail.experts.encoded import EncodedExperts
from rerail.moe.fused_experts import Dims


def _identity(values: Tensor) -> Tensor:
    return values


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": _identity,
}


def mixed(a: Tensor, alpha: Tensor, b: Tensor, activation: str) -> Tensor:
    """Return A_i f(sum_j alpha_ij B_j): (E, p, r), (E, m), (m, r, d) -> (E, p, d)."""
    return a @ ACTIVATIONS[activation](torch.einsum("em,mrd->erd", alpha, b))


class BasisExperts(EncodedExperts):
    """Option `matrices` is `gate+up` or `gate+up+down`; integers `bases` and `rank` are m and r."""

    @staticmethod
    def touched(spec: BankSpec) -> frozenset[str]:
        """Down stays dense unless it is factorised; biases always do."""
        down = "down" in spec.options["matrices"].split("+")
        return frozenset({"gate_up_proj", "down_proj"} if down else {"gate_up_proj"})

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        n, p, d = dims.experts, dims.intermediate, dims.hidden
        m, r = spec.integer("bases"), spec.integer("rank")
        parts = {"A": (n, p, r), "alpha": (n, m), "B": (m, r, d)}
        names = spec.options["matrices"].split("+")
        if (activation := spec.options["activation"]) not in ACTIVATIONS:
            raise InputError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
        return {f"{name}.{part}": shape for name in names for part, shape in parts.items()}

    @staticmethod
    def common(spec: BankSpec, name: str) -> bool:  # noqa: ARG004
        return name.endswith(".B")

    def matrix(self, name: str, expert: int) -> Tensor:
        a, alpha, b = (self.solved(f"{name}.{part}") for part in ("A", "alpha", "B"))
        own = slice(expert, expert + 1)
        [matrix] = mixed(a[own], alpha[own], b, self.spec.options["activation"])
        return matrix.mT if name == "down" else matrix
