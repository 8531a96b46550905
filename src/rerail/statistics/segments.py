"""A deterministic sample of whole segments of the text, which some methods average or norm over."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.statistics.statistic import RoutedTokens
from rerail.statistics.token_sample import TokenSample, hashed, keyed, keys_of


@dataclass(frozen=True)
class Segments(TokenSample):
    """The inputs of the experts in up to `count` segments. float32 (N, H + 2).

    As `TokenSample`, with the hash of a token's segment, position // length: segments are kept or
    left out as a whole, so N varies with padding. Rows of one segment lie together.

    Attributes:
        length: tokens in a segment; None for the whole sequences that the model reads.
    """

    length: int | None = None

    def measure(self, tokens: RoutedTokens) -> Tensor:
        assert tokens.position is not None
        length = self.length or tokens.block
        assert length is not None
        return self._cut(keyed(hashed(tokens.position // length), tokens.hidden))

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return self._cut(torch.cat([a, b]))

    def _cut(self, rows: Tensor) -> Tensor:
        keys = keys_of(rows)
        order = keys.argsort(stable=True)
        return rows[order][_runs(keys[order]) < self.count]

    @staticmethod
    def labels(tensor: Tensor) -> Tensor:
        """Return the segment of each row of a filled statistic, int64 (n,) from 0 on."""
        return _runs(keys_of(tensor))


@dataclass(frozen=True)
class OriginalSegments(Segments):
    """`Segments` of the original model, the same tokens before anything was compressed.

    A sequential driver measures it once, as it does `OriginalTokenSample`.
    """


def _runs(keys: Tensor) -> Tensor:
    """Number the runs of equal keys."""
    return F.pad((keys[1:] != keys[:-1]).long().cumsum(dim=0), (1, 0))[: len(keys)]
