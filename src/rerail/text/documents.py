"""A document, its split by name, and the near-duplicate filter that keeps splits apart."""

import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rerail.text.tokens import Text

Split = Literal["train", "calibration", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "heldout")
_UPPER = {"train": 0.7, "calibration": 0.9, "heldout": 1.0}
_SHINGLE_WORDS = 8
_SAMPLE_EVERY = 8
_NEAR_DUPLICATE = 0.5


@dataclass(frozen=True)
class Document:
    """A named text. The name decides the split, so it must not change with the text."""

    name: str
    text: Text


def split_of(name: str) -> Split:
    """Return the split of a name: 70 / 20 / 10 % by sha256, whatever other documents there are."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return next(split for split in SPLITS if share < _UPPER[split])


def shingles(text: str) -> np.ndarray:
    """Return a content-defined eighth of the hashes of all runs of eight words, as uint64."""
    words = np.array([zlib.crc32(w.encode()) for w in text.lower().split()], dtype=np.uint64)
    n = len(words) - _SHINGLE_WORDS + 1
    if n <= 0:
        return np.array([zlib.crc32(text.lower().encode())], dtype=np.uint64)
    mixed = np.zeros(n, dtype=np.uint64)
    for i in range(_SHINGLE_WORDS):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + words[i : i + n]
        mixed ^= mixed >> np.uint64(29)
    sampled = np.unique(mixed[(mixed >> np.uint64(7)) % np.uint64(_SAMPLE_EVERY) == 0])
    return sampled if len(sampled) else mixed[:1]


def without_near_duplicates(documents: Iterable[Document]) -> list[Document]:
    """Drop each document that shares half of its shingles or more with documents before it.

    Documents are visited split by split (train first) and by name, so a held-out document never
    shares half of its sampled shingles with anything that may be trained on or calibrated with.
    """
    order = {split: i for i, split in enumerate(SPLITS)}
    seen: set[int] = set()
    accepted = []
    for document in sorted(documents, key=lambda d: (order[split_of(d.name)], d.name)):
        hashes = shingles(document.text[:]).tolist()
        if sum(h in seen for h in hashes) < _NEAR_DUPLICATE * len(hashes):
            seen.update(hashes)
            accepted.append(document)
    return accepted
