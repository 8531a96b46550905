"""Delta form: an expert matrix (out, in) is a base that the layer shares, plus U_i V_i of low rank.

Own rows (`rows: own`): U (out, R) and V (R, in), R = sum of the ranks r_i; expert i owns the next
r_i columns and rows. Shared rows (`rows: shared`): V (r, in) once, U (P, out, r). With the integers
`channels` (those of the I that are left) everything is stored for these channels only; the others
are zero in all experts.
"""

import torch
from torch import Tensor

from rerail.experts.base import BankSpec, EncodedExperts
from rerail.moe.fused_experts import Dims, ExpertWeights


class DeltaExperts(EncodedExperts):
    """Integers `gate`, `up` and `down` are ranks, one each or one for all."""

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        if "channels" in spec.integers:
            dims = dims._replace(intermediate=len(spec.each("channels")))
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (out, inner) in dims.matrices.items():
            own = spec.options["rows"] == "own"
            rank = sum(spec.each(name)) if own else spec.integer(name)
            left = (out, rank) if own else (spec.stored, out, rank)
            shapes |= {f"{name}.base": (out, inner), f"{name}.U": left, f"{name}.V": (rank, inner)}
        return shapes

    @staticmethod
    def common(spec: BankSpec, name: str) -> bool:
        return name.endswith(".base") or (spec.options["rows"] == "shared" and name.endswith(".V"))

    def expand(self) -> dict[str, Tensor]:
        gate, up, down = map(self._matrix, self.dims.matrices)
        if "channels" in self.spec.integers:
            gate, up, down = self._padded(gate, 1), self._padded(up, 1), self._padded(down, 2)
        return self.layout.pack(ExpertWeights(gate, up, down))

    def _matrix(self, name: str) -> Tensor:
        base, u, v = (self.solved(f"{name}.{part}") for part in ("base", "U", "V"))
        if self.spec.options["rows"] == "shared":
            return base + u @ v
        ranks = list(self.spec.each(name))
        pairs = zip(torch.split(u, ranks, dim=1), torch.split(v, ranks), strict=True)
        return torch.stack([base + a @ b for a, b in pairs])

    def _padded(self, matrix: Tensor, axis: int) -> Tensor:
        shape = list(matrix.shape)
        shape[axis] = self.dims.intermediate
        at = torch.tensor(self.spec.each("channels"), device=matrix.device)
        return matrix.new_zeros(shape).index_copy(axis, at, matrix)
