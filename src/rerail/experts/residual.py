"""Residual form: an expert is a centre that the layer shares plus a residual of its own.

An expert is its channels, one a row: [W_gate | W_up | W_down^T] (I, 3H). `base` (I, 3H) is shared.
`sparse` residuals: of the 3HI entries, row by row, those whose bit is set in `mask` (E, ceil(3HI /
16)), int16 words filled from the lowest bit on, are `values` (E, k); the others are zero.
`low_rank` residuals: U (I, R) and V (R, 3H), R = sum of the ranks r_e; expert e owns the next r_e
columns and rows. Sums are float32 or wider, rounded once.

Channels lie in the order of the centre's, and the biases of gate and up with them: `gate_bias` and
`up_bias` (E, I), in full, where a family has them.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.experts.base import BankSpec, EncodedExperts, Stored
from rerail.moe.fused_experts import Dims, ExpertWeights

_WORD = 16


def mask_words(mask: Tensor) -> Tensor:
    """Return bits (..., n) as int16 words (..., ceil(n / 16)); bit i of a word is worth 2^i."""
    bits = F.pad(mask.to(torch.int32), (0, -mask.shape[-1] % _WORD)).unflatten(-1, (-1, _WORD))
    steps = torch.arange(_WORD, device=mask.device, dtype=torch.int32)
    return (bits << steps).sum(dim=-1, dtype=torch.int32).to(torch.int16)


def mask_bits(words: Tensor, n: int) -> Tensor:
    """Return the n bits (..., n), boolean: the inverse of `mask_words`."""
    steps = torch.arange(_WORD, device=words.device, dtype=torch.int32)
    bits = (words.to(torch.int32).unsqueeze(-1) >> steps) & 1
    return bits.flatten(-2)[..., :n].bool()


def largest(residuals: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `mask` (E, words) and `values` (E, count): the largest entries of each row (E, n)."""
    at = residuals.abs().topk(count).indices.sort().values
    mask = torch.zeros_like(residuals, dtype=torch.bool).scatter_(1, at, True)
    return mask_words(mask), residuals.gather(1, at)


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
        n, p, d = spec.stored, dims.intermediate, 3 * dims.hidden
        shapes: dict[str, tuple[int, ...]] = {"base": (p, d)}
        if spec.options["residual"] == "sparse":
            shapes |= {"mask": (n, -(-p * d // _WORD)), "values": (n, spec.integer("values"))}
        else:
            rank = sum(spec.each("rank"))
            shapes |= {"U": (p, rank), "V": (rank, d)}
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

    def expand(self) -> dict[str, Tensor]:
        gate, up, down = self._whole().split(self.dims.hidden, dim=-1)
        packed = self.layout.pack(ExpertWeights(gate, up, down.mT))
        if "biases" in self.spec.options:
            biases = self.layout.joined(self.solved("gate_bias"), self.solved("up_bias"))
            packed["gate_up_proj_bias"] = biases
        return packed

    def _whole(self) -> Tensor:
        """Return all experts' channels (E, I, 3H)."""
        base = self.solved("base")
        wide = torch.promote_types(base.dtype, torch.float32)
        if self.spec.options["residual"] == "sparse":
            whole = base.to(wide).flatten().repeat(self.spec.stored, 1)
            # row by row, as `mask` and `values` are: every row has k bits
            whole[mask_bits(self.solved("mask"), base.numel())] += self.solved("values").flatten()
            return whole.unflatten(1, base.shape).to(base.dtype)
        u, v = self.solved("U").to(wide), self.solved("V").to(wide)
        ranks = list(self.spec.each("rank"))
        pairs = zip(torch.split(u, ranks, dim=1), torch.split(v, ranks), strict=True)
        return torch.stack([(base.to(wide) + a @ b).to(base.dtype) for a, b in pairs])
