"""Count models of the training tokens: what a transformer of the zoo has to beat.

Both are fitted on the very tokens that the models saw, but for a slice at the end, on which their
one constant is chosen; nothing is tuned on held-out text.
"""

import numpy as np

TUNED_SHARE = 0.02
ADDED = (0.01, 0.1, 1.0, 10.0)
DISCOUNTS = tuple(np.round(np.arange(0.3, 1.0, 0.05), 2))


class Unigram:
    """p(w) = (c(w) + k) / (N + kV)."""

    def __init__(self, blocks: np.ndarray, vocabulary: int, added: float):
        counts = np.bincount(blocks.ravel(), minlength=vocabulary) + added
        self.logs = np.log(counts / counts.sum())

    def nll(self, blocks: np.ndarray) -> np.ndarray:
        """Return the NLL (B, S-1) of every target in nats."""
        return -self.logs[blocks[:, 1:]]


class Bigram:
    """Interpolated Kneser-Ney with one discount d:

    p(w | v) = max(c(v, w) - d, 0) / c(v) + d N1+(v .) / c(v) * (N1+(. w) + 1) / (N1+(..) + V).
    """

    def __init__(self, blocks: np.ndarray, vocabulary: int, discount: float):
        pairs = blocks[:, :-1].astype(np.int64) * vocabulary + blocks[:, 1:]
        counts = np.bincount(pairs.ravel(), minlength=vocabulary**2).astype(np.float32)
        counts = counts.reshape(vocabulary, vocabulary)
        kinds = counts > 0
        lower = kinds.sum(axis=0) + 1.0
        self.lower = (lower / lower.sum()).astype(np.float32)
        self.total = counts.sum(axis=1)
        self.spared = discount * kinds.sum(axis=1)
        self.kept = np.maximum(counts - discount, 0, out=counts)

    def nll(self, blocks: np.ndarray) -> np.ndarray:
        """Return the NLL (B, S-1) of every target in nats; an unseen context backs off wholly."""
        v, w = blocks[:, :-1], blocks[:, 1:]
        total = self.total[v]
        seen = (self.kept[v, w] + self.spared[v] * self.lower[w]) / np.maximum(total, 1)
        return -np.log(np.where(total > 0, seen, self.lower[w]).astype(np.float64))


def tuned(kind: type, constants: tuple, blocks: np.ndarray, vocabulary: int) -> tuple:
    """Return the model with the best constant on the last blocks, and that constant."""
    cut = len(blocks) - max(1, round(len(blocks) * TUNED_SHARE))
    losses = [kind(blocks[:cut], vocabulary, c).nll(blocks[cut:]).mean() for c in constants]
    best = constants[int(np.argmin(losses))]
    return kind(blocks[:cut], vocabulary, best), float(best)
