"""Grouped basis form: gate and up are A_i f(sum_j alpha_ij B_gj) + unvec(P eta_i), i in group g.

Symbols: A_i (I, K_g), its own; B_gj (K_g, H), the m bases of its group; alpha (E, m), stored where
m > 1; f the activation; eta_i (s,), its residual: each of the IH entries of a matrix lies in one of
s buckets, and P (IH, s) has one entry a row, so scaled that P^T P = 1. A is stored side by side, as
(I, sum_i K_g(i)), B one below the other, as (m sum_g K_g, H). `down` stays dense.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.errors import InputError
from rerail.experts.base import BankSpec
from rerail.experts.encoded import EncodedExperts
from rerail.moe.fused_experts import Dims, decoded_product

_BENT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": torch.clone,
}


@functools.lru_cache(maxsize=4)
def bucket_of(entries: int, buckets: int, seed: int) -> Tensor:
    """Return the bucket of each entry, int32 (entries,): a random deal, even to within one."""
    generator = torch.Generator().manual_seed(seed)
    deal = torch.randperm(entries, generator=generator, device="cpu")
    return (deal % buckets).to(torch.int32)


def num_buckets(share: float, entries: int) -> int:
    """Return how many buckets a share of the entries is.

    Raises:
        InputError: the share is none.
    """
    if not 0 <= share <= 1:
        raise InputError(f"a residual's share={share} is outside [0, 1]")
    return int(share * entries)


def bucket_scale(entries: int, buckets: int, like: Tensor) -> Tensor:
    """Return 1 / sqrt(count) of each bucket (buckets,)."""
    count = (entries - 1 - torch.arange(buckets, device=like.device)) // buckets + 1
    return count.to(like).rsqrt()


def in_buckets(residuals: Tensor, buckets: int, seed: int) -> Tensor:
    """Return eta = P^T vec(R) (E, buckets) of residuals (E, I, H)."""
    flat = residuals.flatten(1)
    entries = flat.shape[1]
    at = bucket_of(entries, buckets, seed).to(flat.device)
    sums = flat.new_zeros(len(flat), buckets).index_add_(1, at, flat)
    return sums * bucket_scale(entries, buckets, flat)


def from_buckets(eta: Tensor, entries: int, seed: int) -> Tensor:
    """Return P eta (entries,) of eta (buckets,)."""
    at = bucket_of(entries, len(eta), seed).to(eta.device)
    return (eta * bucket_scale(entries, len(eta), eta)).index_select(0, at)


class GroupedBasisExperts(EncodedExperts):
    """Option `activation`; integers `groups`, `gate`, `up`, `bases`, `buckets` and `seed`.

    They are the group of each expert, the ranks K_g of each group by matrix, m, s (0 for no
    residual), and what buckets are dealt from.
    """

    @staticmethod
    def touched(spec: BankSpec) -> frozenset[str]:  # noqa: ARG004
        """Down and biases stay."""
        return frozenset({"gate_up_proj"})

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        m, s, shapes = spec.integer("bases"), spec.integer("buckets"), dict[str, tuple[int, ...]]()
        for name in ("gate", "up"):
            ranks = spec.each(name)
            wide = sum(ranks[g] for g in spec.each("groups"))
            shapes |= {f"{name}.A": (dims.intermediate, wide)}
            shapes |= {f"{name}.B": (m * sum(ranks), dims.hidden)}
            shapes |= {f"{name}.alpha": (spec.stored, m)} if m > 1 else {}
            shapes |= {f"{name}.eta": (spec.stored, s)} if s else {}
        return shapes

    @staticmethod
    def common(spec: BankSpec, name: str) -> bool:  # noqa: ARG004
        """The bases of all groups count as read: the chosen experts may be of any."""
        return name.endswith(".B")

    def matrix(self, name: str, expert: int) -> Tensor:
        made: Tensor = self._own(name, expert) @ self._inner(name, expert)
        return made.add_(self._residual(name, expert)) if self.spec.integer("buckets") else made

    def product(self, name: str, expert: int, x: Tensor, shared: Tensor | None) -> Tensor | None:
        (p, d), hashed = self.dims.matrices["gate"], self.spec.integer("buckets") > 0
        g = self.spec.each("groups")[expert]
        r = (self.spec.each("gate")[g] + self.spec.each("up")[g]) / 2  # gate and up decide alike
        if name == "down" or len(x) * (r * (p + d) - (0 if hashed else p * d)) > p * r * d:
            return None  # so many tokens that making the matrix pays; a residual has its size
        middle = decoded_product(x, lambda: self._inner(name, expert))
        out = F.linear(middle, self._own(name, expert))
        if hashed:
            out = out + decoded_product(x, lambda: self._residual(name, expert))
        return out

    def prepared(self, experts: Sequence[int]) -> dict[tuple[str, int], Tensor]:
        """Bend the bases that some experts share of their group once."""
        made: dict[tuple[str, int], Tensor] = {}
        groups, shared = self.spec.each("groups"), self.spec.integer("bases") == 1
        for name in ("gate", "up"):
            bent: dict[int, Tensor] = {}
            for e in experts:
                known = bent.get(groups[e]) if shared else None
                bent[groups[e]] = made[name, e] = self._inner(name, e) if known is None else known
        return made

    def _own(self, name: str, expert: int) -> Tensor:
        """Return A_i (I, K_g)."""
        ranks, groups = self.spec.each(name), self.spec.each("groups")
        left = sum(ranks[h] for h in groups[:expert])
        return self.solved(f"{name}.A")[:, left : left + ranks[groups[expert]]]

    def _inner(self, name: str, expert: int) -> Tensor:
        """Return f(sum_j alpha_ij B_gj) (K_g, H)."""
        if (name, expert) in self.ready:
            return self.ready[name, expert]
        ranks, m = self.spec.each(name), self.spec.integer("bases")
        g = self.spec.each("groups")[expert]
        b = self.solved(f"{name}.B")[m * sum(ranks[:g]) : m * sum(ranks[: g + 1])]
        if m > 1:
            own = self.solved(f"{name}.alpha")[expert]
            b = torch.einsum("m,mkd->kd", own, b.view(m, ranks[g], -1))
        return _BENT[self.spec.options["activation"]](b)

    def _residual(self, name: str, expert: int) -> Tensor:
        """Return unvec(P eta_i) (I, H)."""
        shape, eta = self.dims.matrices[name], self.solved(f"{name}.eta")[expert]
        flat = from_buckets(eta, shape[0] * shape[1], self.spec.integer("seed"))
        return flat.view(shape)
