"""A deterministic sample of what goes into the experts, for methods that solve on tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.moe.model import MoELayer
from rerail.statistics.statistic import RoutedStatistic, RoutedTokens

_KEY = 24  # bits of a key in one float32, which holds integers below 2^24 exactly


@dataclass(frozen=True)
class TokenSample(RoutedStatistic):
    """Up to `count` inputs of the experts. float32 (N, H + 2).

    Kept are the tokens whose position in the text has the smallest hash (splitmix64, upper 48
    bits), so that any cut of the text into shards and batches keeps the same ones. The first two
    columns hold the hash and order the rows; N < count where the text is shorter.
    """

    count: int

    merges_by = "sample"

    def empty(self, layer: MoELayer) -> Tensor:
        """Return float32 (0, H + 2)."""
        return torch.zeros(0, layer.hidden_size + 2)

    def measure(self, tokens: RoutedTokens) -> Tensor:
        assert tokens.position is not None
        keys, order = hashed(tokens.position).sort()
        return keyed(keys[: self.count], tokens.hidden[order[: self.count]])

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        rows = torch.cat([a, b])
        return rows[keys_of(rows).argsort(stable=True)[: self.count]]

    @staticmethod
    def hidden(tensor: Tensor) -> Tensor:
        """Return the sampled inputs (n, H) of a filled statistic."""
        return tensor[:, 2:]


@dataclass(frozen=True)
class OriginalTokenSample(TokenSample):
    """`TokenSample` of the original model, the same tokens before anything was compressed.

    A sequential driver measures it once and leaves it as it is while the others are measured anew.
    """


def keyed(keys: Tensor, hidden: Tensor) -> Tensor:
    """Return float32 rows (n, H + 2): 48-bit keys (n,) in two exact columns, then hidden (n, H)."""
    halves = [keys >> _KEY, keys & ((1 << _KEY) - 1)]
    return torch.cat([*(half.float().unsqueeze(1) for half in halves), hidden.float()], dim=1)


def keys_of(rows: Tensor) -> Tensor:
    """Return the keys of rows, int64 (n,)."""
    return (rows[:, 0].long() << _KEY) + rows[:, 1].long()


def hashed(position: Tensor) -> Tensor:
    """Return the upper 48 bits of splitmix64 of int64 positions (sums and products wrap)."""
    # torch has no unsigned 64-bit products; signed ones wrap to the same bits
    z = (position + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(z ^ _shifted(z, 31), 16)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned numbers do."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
