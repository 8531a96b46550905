"""Budgets: what share of which quantity goes, and its completion to whole units."""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

from rerail.errors import InputError
from rerail.moe.model import MoELayer


class Budget(Protocol):
    """What share of which quantity a method takes away.

    Attributes:
        quantity: what the share is of.
        choices: how a user asks for it, for messages.
    """

    quantity: ClassVar[str]
    choices: ClassVar[str]

    @property
    def removed(self) -> float | None:
        """The share that goes, in [0, 1); None lets the method's own rule decide."""


@dataclass(frozen=True)
class Ratio:
    """Removed share of the bytes of routed experts in the checkpoint's dtype.

    Attributes:
        removed: in [0, 1).
        counts: what the share is of; `routed` experts.
    """

    removed: float
    counts: str = "routed"

    quantity: ClassVar[str] = "ratio"
    choices: ClassVar[str] = "ratio=half, quarter ... or ratio.removed=0.3; in Python Ratio(0.3)"

    def __post_init__(self) -> None:
        if not 0 <= self.removed < 1:
            raise InputError(
                f"ratio {self.removed} is outside [0, 1): it is the removed share of routed experts"
            )
        if self.counts != "routed":
            raise InputError(f"ratio counts {self.counts!r}, which is not known; allowed: 'routed'")


@dataclass(frozen=True)
class Bits:
    """Average bits of an expert's number, what quantisers are swept by.

    Scales and zeros are left out, but where a method says that it counts them (CAMERA-Q).

    Attributes:
        average: in [1, 16]; 16 leaves everything as it is.
    """

    average: float

    quantity: ClassVar[str] = "bits"
    choices: ClassVar[str] = "ratio=bits8, bits4, bits3, bits2; in Python Bits(4)"

    def __post_init__(self) -> None:
        if not 1 <= self.average <= 16:
            raise InputError(f"ratio.average={self.average} bits is outside [1, 16]")

    @property
    def removed(self) -> float:
        """The removed share of 16 bits, before scales and zeros."""
        return 1 - self.average / 16


@dataclass(frozen=True)
class Skip:
    """Share of expert activations that are skipped on the calibration text.

    Attributes:
        share: in [0, 1); None lets the method's own rule decide.
    """

    share: float | None = None

    quantity: ClassVar[str] = "skip"
    choices: ClassVar[str] = "skip=rule, skip=quarter ... or skip.share=0.3; in Python Skip(0.3)"

    def __post_init__(self) -> None:
        if self.share is not None and not 0 <= self.share < 1:
            raise InputError(f"skip.share={self.share} is outside [0, 1)")

    @property
    def removed(self) -> float | None:
        """The share itself."""
        return self.share


def dense_numbers(layer: MoELayer) -> int:
    """Return how many numbers a layer's experts have where they are stored in full."""
    return layer.expert_size * layer.num_experts


def units_kept(units: int, removed: float, whole: float | None = None) -> int:
    """Return how many equal units stay where int(whole * removed) go, as papers count experts.

    The tolerance makes it exact where integers allow: 0.7 of 10 is 7, though 10 * 0.7 is less.

    Args:
        units: how many there are.
        removed: the share that goes.
        whole: what the share is of, in units; by default all of them. It is more where something
            belongs to no unit.
    """
    return units - math.floor((units if whole is None else whole) * removed + 1e-9)


def numbers_kept(numbers: int, removed: float) -> int:
    """Return the most numbers (or bits) that leave the share gone, exact where integers allow."""
    tolerance = max(1e-6, 1e-15 * numbers)  # of a product of doubles, also in the largest layers
    return numbers - math.ceil(numbers * removed - tolerance)
