"""Tucker form: an expert matrix (out, in) is U2 (sum_a U1[e, a] G_a) U3^T.

The layer shares U2 `out` (out, r2) and U3 `in` (in, r3); the core G is (r1, r2, r3). At r1 = E an
expert has a slice of the core of its own; below, `expert` U1 (E, r1) mixes slices.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.experts.base import BankSpec
from rerail.experts.encoded import EncodedExperts
from rerail.moe.fused_experts import Dims


class TuckerExperts(EncodedExperts):
    """Integers `gate`, `up` and `down` are the ranks (r1, r2, r3) of a matrix type."""

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (out, inner) in dims.matrices.items():
            r1, r2, r3 = spec.each(name)
            shapes |= {f"{name}.core": (r1, r2, r3)}
            shapes |= {f"{name}.expert": (spec.stored, r1)} if r1 < spec.stored else {}
            shapes |= {f"{name}.out": (out, r2), f"{name}.in": (inner, r3)}
        return shapes

    @staticmethod
    def common(spec: BankSpec, name: str) -> bool:
        """Slices that experts mix are read by all tokens, as the factors are."""
        matrix, _, part = name.partition(".")
        return part in ("out", "in") or (part == "core" and spec.each(matrix)[0] < spec.stored)

    def matrix(self, name: str, expert: int) -> Tensor:
        inner: Tensor = self.solved(f"{name}.in")
        return self.solved(f"{name}.out") @ self._core(name, expert) @ inner.mT

    def product(self, name: str, expert: int, x: Tensor, shared: Tensor | None) -> Tensor:
        """Return U2 G_e U3^T x; for `down` without U2, which comes last."""
        inner = x @ self.solved(f"{name}.in") if shared is None else shared
        out = F.linear(inner, self._core(name, expert))
        return out if name == "down" else F.linear(out, self.solved(f"{name}.out"))

    def shared(self, name: str, hidden: Tensor) -> Tensor:
        """Return U3^T x, (T, r3)."""
        return hidden @ self.solved(f"{name}.in")

    def finish(self, total: Tensor) -> Tensor:
        return F.linear(total, self.solved("down.out"))

    def _core(self, name: str, expert: int) -> Tensor:
        """Return an expert's slice of the core (r2, r3)."""
        core: Tensor = self.solved(f"{name}.core")
        own: Tensor = (
            core[expert]
            if self.spec.each(name)[0] == self.spec.stored
            else (torch.tensordot(self.solved(f"{name}.expert")[expert], core, dims=1))
        )
        return own
