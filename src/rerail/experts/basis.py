"""Basis form: an expert matrix is A_i f(sum_j alpha_ij B_j), the bases B_j shared in the layer.

Symbols (for each factorised matrix, oriented p x d = I x H): A (E, p, r), alpha (E, m) with rows on
the simplex, B (m, r, d), f the activation. `down` (H, I) is factorised on its transpose.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.errors import InputError
from rerail.experts.base import BankSpec
from rerail.experts.encoded import EncodedExperts
from rerail.moe.fused_experts import Dims, decoded_product


def _identity(values: Tensor) -> Tensor:
    return values


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": _identity,
}


def inner(alpha: Tensor, b: Tensor, activation: str) -> Tensor:
    """Return f(sum_j alpha_ij B_j): (E, m), (m, r, d) -> (E, r, d)."""
    return ACTIVATIONS[activation](torch.einsum("em,mrd->erd", alpha, b))


def mixed(a: Tensor, alpha: Tensor, b: Tensor, activation: str) -> Tensor:
    """Return A_i f(sum_j alpha_ij B_j): (E, p, r), (E, m), (m, r, d) -> (E, p, d)."""
    return a @ inner(alpha, b, activation)


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
        matrix = self.solved(f"{name}.A")[expert] @ self._inner(name, expert)
        return matrix.mT if name == "down" else matrix

    def product(self, name: str, expert: int, x: Tensor, shared: Tensor | None) -> Tensor | None:
        if name not in self.spec.options["matrices"].split("+"):
            return None
        a = self.solved(f"{name}.A")[expert]
        (p, r), d = a.shape, self.dims.hidden
        if len(x) * (r * (p + d) - p * d) > p * r * d:
            return None  # so many tokens that making the matrix pays
        if name == "down":  # factorised on its transpose
            return decoded_product(x @ a, lambda: self._inner(name, expert).mT)
        return F.linear(decoded_product(x, lambda: self._inner(name, expert)), a)

    def prepared(self, experts: Sequence[int]) -> dict[tuple[str, int], Tensor]:
        """Mix the bases of some experts together, so that they are read once for all of these."""
        made: dict[tuple[str, int], Tensor] = {}
        for name in self.spec.options["matrices"].split("+"):
            keys = [(name, e) for e in experts]
            made.update(zip(keys, self._mixed(name, list(experts)), strict=True))
        return made

    def _inner(self, name: str, expert: int) -> Tensor:
        """Return f(sum_j alpha_ij B_j) of an expert (r, d)."""
        if (name, expert) in self.ready:
            return self.ready[name, expert]
        return self._mixed(name, [expert])[0]

    def _mixed(self, name: str, experts: list[int]) -> Tensor:
        """Return f(sum_j alpha_ij B_j) of some experts (n, r, d)."""
        alpha, b = self.solved(f"{name}.alpha")[experts], self.solved(f"{name}.B")
        return inner(alpha, b, self.spec.options["activation"])
