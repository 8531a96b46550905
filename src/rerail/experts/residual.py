"""Residual form: an expert is a centre that the layer shares plus a residual of its own.

An expert's channels are the rows of gate, up and down^T, three (I, H); `base` (3, I, H) is shared.
`sparse` residuals: `mask` (E, 3, ceil(IH / 16)) has a bit for each entry, in int16 words filled row
by row from the lowest bit on; `values` (E, k) are the entries whose bit is set, in the same order;
the others are zero. `low_rank` residuals: the three are U_e V_e, with U (I, R), V (3, R, H), R =
sum of the ranks r_e; expert e owns the next r_e columns and rows.

Channels lie in the order of the centre's, and the biases of gate and up with them: `gate_bias` and
`up_bias` (E, I), in full, where a family has them. Decoded sums are rounded once.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.experts.base import BankSpec, Stored
from rerail.experts.encoded import EncodedExperts
from rerail.moe.fused_experts import Dims

_WORD = 16
_AT = {"gate": 0, "up": 1, "down": 2}


def mask_words(mask: Tensor) -> Tensor:
    """Return bits (..., n) as int16 words (..., ceil(n / 16)); bit i of a word is worth 2^i."""
    padded = F.pad(mask.to(torch.int32), (0, -mask.shape[-1] % _WORD))
    bits = padded.reshape(*mask.shape[:-1], -1, _WORD)
    words = (bits << torch.arange(_WORD, device=mask.device, dtype=torch.int32)).sum(dim=-1)
    return words.to(torch.int16)


def mask_bits(words: Tensor, n: int) -> Tensor:
    """Return the n bits (..., n), boolean: the inverse of `mask_words`."""
    # bytes are lowest first, as in memory
    parts = words.contiguous().view(torch.uint8).unsqueeze(-1)
    bits = (parts >> torch.arange(8, device=words.device, dtype=torch.uint8)) & 1
    return bits.flatten(-2)[..., :n].bool()


def by_matrix(clouds: Tensor) -> Tensor:
    """Return rows (..., n, 3H) as those of gate, up and down^T (..., 3, n, H)."""
    return torch.unflatten(clouds, -1, (3, -1)).transpose(-3, -2).contiguous()


def largest(residuals: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `mask` and `values` of the `count` largest entries of each expert (E, 3, I, H)."""
    flat = residuals.flatten(1)
    at = flat.abs().topk(count).indices.sort().values
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, at, True)
    return mask_words(mask.view(*residuals.shape[:2], -1)), flat.gather(1, at)


def _mask_in_words(stored: Stored, width: int) -> Stored:
    """Return 16 bits for a word of the mask, `width` for every number."""
    names = cast(Mapping[tuple[int, str], int], stored)
    return {key: n * (_WORD if key[1] == "mask" else width) for key, n in names.items()}


class ResidualExperts(EncodedExperts):
    """Option `residual` is `sparse`, with integer `values` k, or `low_rank`, with integers `rank`.

    Option `biases` is `gate+up` where there are some.
    """

    @staticmethod
    def touched(spec: BankSpec) -> frozenset[str]:
        """The bias of down stays: it has no channels."""
        biases = {"gate_up_proj_bias"} if "biases" in spec.options else set()
        return frozenset({"gate_up_proj", "down_proj"} | biases)

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        n, p, d = spec.stored, dims.intermediate, dims.hidden
        shapes: dict[str, tuple[int, ...]] = {"base": (3, p, d)}
        if spec.options["residual"] == "sparse":
            shapes |= {"mask": (n, 3, -(-p * d // _WORD)), "values": (n, spec.integer("values"))}
        else:
            rank = sum(spec.each("rank"))
            shapes |= {"U": (p, rank), "V": (3, rank, d)}
        biases = ("gate_bias", "up_bias") if "biases" in spec.options else ()
        return shapes | dict.fromkeys(biases, (n, p))

    @staticmethod
    def common(spec: BankSpec, name: str) -> bool:  # noqa: ARG004
        return name == "base"

    @classmethod
    def predicted_bits(cls, spec: BankSpec, layer: int, dims: Dims, width: int) -> Stored:
        return _mask_in_words(cls.predicted(spec, layer, dims), width)

    def stored_bits(self, width: int) -> Stored:
        return _mask_in_words(self.stored(), width)

    @property
    def sparse(self) -> bool:
        """Whether residuals are entries."""
        return self.spec.options["residual"] == "sparse"

    def matrix(self, name: str, expert: int) -> Tensor:
        base = self.solved("base")[_AT[name]]
        wide = base.to(torch.promote_types(base.dtype, torch.float32))
        if self.sparse:
            made = wide + self._entries(name, expert).to(wide)
        else:
            u, v = self._factors(name, expert)
            made = torch.addmm(wide, u.to(wide), v.to(wide))
        rows = made.to(base.dtype)
        return rows.mT if name == "down" else rows

    def product(self, name: str, expert: int, x: Tensor, shared: Tensor | None) -> Tensor | None:
        """Return base x + U V x; for `down` what its base takes, and V^T U^T x beside it."""
        if self.sparse:
            return None
        u, v = self._factors(name, expert)
        if shared is None:
            return torch.cat([x, x @ u @ v], dim=1)
        return torch.addmm(shared, F.linear(x, v), u.mT)

    def shared(self, name: str, hidden: Tensor) -> Tensor | None:
        """Return base x, (T, I)."""
        return None if self.sparse else F.linear(hidden, self.solved("base")[_AT[name]])

    def finish(self, total: Tensor) -> Tensor:
        if self.sparse:
            return total
        base = self.solved("base")[_AT["down"]]
        return torch.addmm(total[:, len(base) :], total[:, : len(base)], base)

    def middle_bias(self, expert: int) -> Tensor | None:
        if "biases" not in self.spec.options:
            return None
        return self.layout.join(self.solved("gate_bias")[expert], self.solved("up_bias")[expert])

    def expand(self) -> dict[str, Tensor]:
        packed = super().expand()
        if "biases" in self.spec.options:
            biases = self.layout.join(self.solved("gate_bias"), self.solved("up_bias"))
            packed["gate_up_proj_bias"] = biases
        return packed

    def _entries(self, name: str, expert: int) -> Tensor:
        """Return a sparse residual (I, H)."""
        at, words = _AT[name], self.solved("mask")[expert]
        values, (p, d) = self.solved("values")[expert], self.solved("base").shape[1:]
        before = int(mask_bits(words[:at], p * d).sum())
        residual = values.new_zeros(p * d)
        return residual.masked_scatter(mask_bits(words[at], p * d), values[before:]).view(p, d)

    def _factors(self, name: str, expert: int) -> tuple[Tensor, Tensor]:
        """Return U (I, r) and V (r, H) of an expert."""
        ranks = self.spec.each("rank")
        own = slice(sum(ranks[:expert]), sum(ranks[: expert + 1]))
        return self.solved("U")[:, own], self.solved("V")[_AT[name], own]
