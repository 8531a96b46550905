"""Low-rank form: an expert matrix (out, in) is U_i V_i.

Own rows (`rows: own`): U (out, R) and V (R, in), R = sum of the ranks r_i; expert i owns the next
r_i columns and rows. Shared rows (`rows: shared`): V (r, in) once, U (P, out, r); with the integer
`distinct` = k only k of them are stored and U_i = sum_j mix_ij U_j, mix (P, k).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.experts.base import BankSpec
from rerail.experts.encoded import EncodedExperts
from rerail.moe.fused_experts import Dims


class LowRankExperts(EncodedExperts):
    """Integers `gate`, `up` and `down` are ranks, one each or one for all."""

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (out, inner) in dims.matrices.items():
            if spec.options["rows"] == "own":
                rank = sum(spec.each(name))
                shapes |= {f"{name}.U": (out, rank), f"{name}.V": (rank, inner)}
                continue
            rank, few = spec.integer(name), "distinct" in spec.integers
            stored = spec.integer("distinct") if few else spec.stored
            shapes |= {f"{name}.U": (stored, out, rank), f"{name}.V": (rank, inner)}
            shapes |= {f"{name}.mix": (spec.stored, stored)} if few else {}
        return shapes

    @staticmethod
    def common(spec: BankSpec, name: str) -> bool:
        shared = spec.options["rows"] == "shared" and name.endswith(".V")
        return shared or ("distinct" in spec.integers and name.endswith(".U"))

    def matrix(self, name: str, expert: int) -> Tensor:
        u, v = self._factors(name, expert)
        return u @ v

    def product(self, name: str, expert: int, x: Tensor, shared: Tensor | None) -> Tensor:
        u, v = self._factors(name, expert)
        return F.linear(F.linear(x, v) if shared is None else shared, u)

    def shared(self, name: str, hidden: Tensor) -> Tensor | None:
        """Return V x, (T, r), where V is the layer's."""
        own = self.spec.options["rows"] == "own"
        return None if own else F.linear(hidden, self.solved(f"{name}.V"))

    def _factors(self, name: str, expert: int) -> tuple[Tensor, Tensor]:
        """Return U (out, r) and V (r, in) of an expert."""
        u, v = self.solved(f"{name}.U"), self.solved(f"{name}.V")
        if self.spec.options["rows"] == "own":
            ranks = self.spec.each(name)
            own = slice(sum(ranks[:expert]), sum(ranks[: expert + 1]))
            return u[:, own], v[own]
        if "distinct" in self.spec.integers:
            return torch.einsum("k,kor->or", self.solved(f"{name}.mix")[expert], u), v
        return u[expert], v
