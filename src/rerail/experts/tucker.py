"""Tucker form: an expert matrix (out, in) is U2 (sum_a U1[e, a] G_a) U3^T.

The layer shares U2 `out` (out, r2) and U3 `in` (in, r3); the core G is (r1, r2, r3). At r1 = E an
expert has a slice of the core of its own; below, `expert` U1 (E, r1) mixes slices.
"""

import torch
from torch import Tensor

from rerail.experts.base import BankSpec, EncodedExperts
from rerail.moe.fused_experts import Dims, ExpertWeights


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

    def expand(self) -> dict[str, Tensor]:
        return self.layout.pack(ExpertWeights(*map(self._matrix, self.dims.matrices)))

    def _matrix(self, name: str) -> Tensor:
        core, out, inner = (self.solved(f"{name}.{part}") for part in ("core", "out", "in"))
        if self.spec.each(name)[0] < self.spec.stored:
            core = torch.tensordot(self.solved(f"{name}.expert"), core, dims=1)
        return out @ core @ inner.mT
