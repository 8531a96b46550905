"""A deterministic sample of whole stretches of text, for methods that average over them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.statistics.rows import Rows, hashed, keyed, keys_of
from rerail.statistics.statistic import RoutedTokens


@dataclass(frozen=True)
class Segments(Rows):
    """The inputs of the experts in up to `count` segments of `length` tokens. float32 (N, H + 2).

    As `Rows`, with the hash of a token's segment, position // length: segments are kept or left
    out as a whole, so N varies with padding. Rows of one segment lie together.
    """

    length: int

    @property
    def name(self) -> str:
        """`segments_<count>_<length>`."""
        return f"segments_{self.count}_{self.length}"

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Keep this batch's segments of smallest hash."""
        assert tokens.position is not None
        return self._cut(keyed(hashed(tokens.position // self.length), tokens.hidden))

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Keep the segments of smallest hash of both."""
        return self._cut(torch.cat([a, b]))

    def _cut(self, rows: Tensor) -> Tensor:
        keys = keys_of(rows)
        order = keys.argsort(stable=True)
        return rows[order][_runs(keys[order]) < self.count]

    @staticmethod
    def labels(tensor: Tensor) -> Tensor:
        """Return the segment of each row of a filled statistic, int64 (n,) from 0 on."""
        return _runs(keys_of(tensor))


def _runs(keys: Tensor) -> Tensor:
    """Number the runs of equal keys."""
    return F.pad((keys[1:] != keys[:-1]).long().cumsum(dim=0), (1, 0))[: len(keys)]
