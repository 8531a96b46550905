"""Low-rank form: an expert matrix (out, in) is U_i V_i.

Own rows (`rows: own`): U (out, R) and V (R, in), R = sum of the ranks r_i; expert i owns the next
r_i columns and rows. Shared rows (`rows: shared`): V (r, in) once, U (P, out, r); with the integer
`distinct` = k only k of them are stored and U_i = sum_j mix_ij U_j, mix (P, k).
"""

import torch
from torch import Tensor

from rerail.experts.base import BankSpec, EncodedExperts
from rerail.moe.fused_experts import Dims, ExpertWeights


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

    def expand(self) -> dict[str, Tensor]:
        return self.layout.pack(ExpertWeights(*map(self._matrix, self.dims.matrices)))

    def _matrix(self, name: str) -> Tensor:
        u, v = self.solved(f"{name}.U"), self.solved(f"{name}.V")
        if self.spec.options["rows"] == "own":
            ranks = list(self.spec.each(name))
            # ranks differ, so there is no batched product
            pairs = zip(torch.split(u, ranks, dim=1), torch.split(v, ranks), strict=True)
            return torch.stack([a @ b for a, b in pairs])
        if "distinct" in self.spec.integers:
            u = torch.einsum("ek,kor->eor", self.solved(f"{name}.mix"), u)
        return u @ v
