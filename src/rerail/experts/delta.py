"""Delta form: an expert matrix (out, in) is a base that the layer shares, plus U_i V_i of low rank.

Own rows (`rows: own`): U (out, R) and V (R, in), R = sum of the ranks r_i; expert i owns the next
r_i columns and rows. Shared rows (`rows: shared`): V (r, in) once, U (P, out, r). With the integers
`channels` (those of the I that are left) everything is stored for these channels only; the others
are zero in all experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.experts.base import BankSpec
from rerail.experts.encoded import EncodedExperts
from rerail.moe.fused_experts import Dims


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

    def matrix(self, name: str, expert: int) -> Tensor:
        u, v = self._factors(name, expert)
        small = self.solved(f"{name}.base") + u @ v
        if "channels" not in self.spec.integers:
            return small
        axis = 1 if name == "down" else 0
        shape = list(small.shape)
        shape[axis] = self.dims.intermediate
        return small.new_zeros(shape).index_copy(axis, self._channels(), small)

    def product(self, name: str, expert: int, x: Tensor, shared: Tensor | None) -> Tensor:
        """Return base x + U V x; for `down` what its base takes, and U V x beside it."""
        u, v = self._factors(name, expert)
        rank = len(v)
        if shared is None:
            return torch.cat([x, F.linear(F.linear(x, v), u)], dim=1)
        if self.spec.options["rows"] == "own":
            return torch.addmm(shared, F.linear(x, v), u.mT)
        return torch.addmm(shared[:, rank:], shared[:, :rank], u.mT)

    def shared(self, name: str, hidden: Tensor) -> Tensor:
        """Return base x, (T, out), after V x where V is the layer's."""
        base = F.linear(hidden, self.solved(f"{name}.base"))
        if self.spec.options["rows"] == "own":
            return base
        return torch.cat([F.linear(hidden, self.solved(f"{name}.V")), base], dim=1)

    def finish(self, total: Tensor) -> Tensor:
        """Return base x + U V x of middle activations that were summed up."""
        base = self.solved("down.base")
        taken = base.shape[1]
        return torch.addmm(total[:, taken:], total[:, :taken], base.mT)

    def middle_bias(self, expert: int) -> Tensor | None:
        bias = super().middle_bias(expert)
        if bias is None or "channels" not in self.spec.integers:
            return bias
        gate, up = self.layout.split(bias)
        return self.layout.join(gate[self._channels()], up[self._channels()])

    def spread(self, middle: Tensor) -> Tensor:
        if "channels" not in self.spec.integers:
            return middle
        whole = middle.new_zeros(len(middle), self.dims.intermediate)
        return whole.index_copy(1, self._channels(), middle)

    def _factors(self, name: str, expert: int) -> tuple[Tensor, Tensor]:
        """Return U (out, r) and V (r, in) of an expert."""
        u, v = self.solved(f"{name}.U"), self.solved(f"{name}.V")
        if self.spec.options["rows"] == "shared":
            return u[expert], v
        ranks = self.spec.each(name)
        own = slice(sum(ranks[:expert]), sum(ranks[: expert + 1]))
        return u[:, own], v[own]

    def _channels(self) -> Tensor:
        return torch.tensor(self.spec.each("channels"), device=self.slots.device)
