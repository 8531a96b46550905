"""The hyper-parameters of a repair; the dataclass is its config."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from rerail.errors import InputError


@dataclass(frozen=True)
class _Settings:
    """What all repairs are told.

    Attributes:
        enabled: false skips the repair.
        validation: share of the calibration blocks held out to choose what is kept.
    """

    enabled: bool = True
    validation: float = 0.125

    def train_blocks(self, blocks: int) -> int:
        """Return how many leading blocks are fitted on; the others validate."""
        return blocks - max(1, round(blocks * self.validation))

    def _check(self, *words: str) -> None:
        """Check the share that validates, and fields that are one of some words."""
        inside = 0 < self.validation < 1
        self._require("validation", inside, "must lie between 0 and 1, both excluded")
        for name in words:
            allowed = get_args(get_type_hints(type(self))[name])
            known = getattr(self, name) in allowed
            self._require(name, known, f"is not one of {', '.join(allowed)}")

    def _require(self, name: str, condition: bool, reason: str) -> None:
        if not condition:
            raise InputError(f"distill.{name}={getattr(self, name)!r} {reason}")


@dataclass(frozen=True)
class RouterKD(_Settings):
    """Router KD (arXiv 2603.02217, table 1 for the preset `router_kd_paper`).

    Attributes:
        learning_rate, weight_decay, warmup: of AdamW; warm-up in steps.
        schedule: `constant`, or `cosine` down to a tenth.
        temperature: tau.
        epochs: passes over the calibration text.
        batch_size, accumulate: sequences a forward, forwards an optimiser step.
        average: `sequence` (the paper's N_x) or `token`.
        teacher: `cached` final hidden states (exact), or `live`.
        trains: `router_rows`, or `router_rows+bias` where the family's routers have a trained bias.
        evaluations: how often the validation KL is computed during training, at most.
        chunk: tokens at a time in the KL; by default 128 on a CPU and 256 on a GPU.
        clip: gradient norm limit, 0 for none.
    """

    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    temperature: float = 1.0
    epochs: int = 1
    batch_size: int = 2
    accumulate: int = 4
    average: Literal["sequence", "token"] = "sequence"
    teacher: Literal["cached", "live"] = "cached"
    trains: Literal["router_rows", "router_rows+bias"] = "router_rows"
    evaluations: int = 8
    chunk: int | None = None
    clip: float = 0.0

    def __post_init__(self) -> None:
        counts = ["epochs", "batch_size", "accumulate", "evaluations"]
        counts += ["chunk"] if self.chunk is not None else []
        for name in ("learning_rate", "temperature", *counts):
            self._require(name, getattr(self, name) > 0, "must be greater than 0")
        for name in ("weight_decay", "warmup", "clip"):
            self._require(name, getattr(self, name) >= 0, "must be at least 0")
        self._check("schedule", "average", "teacher", "trains")


@dataclass(frozen=True)
class Ridge(_Settings):
    """Router rows by least squares, see `rerail.distill.ridge`; no training.

    Attributes:
        ridge: lambda over the mean diagonal of G; 0 is plain least squares, and the larger, the
            less moves.
        trains: `router_rows`, `router_rows+bias` or `bias`; the two with a bias where the family's
            routers add one to their logits.
        sequential: whether each layer is solved on the inputs that earlier repaired layers leave;
            else all in one pass on those of the unrepaired student.
        batch_size: blocks a forward.
    """

    ridge: float = 1e-2
    trains: Literal["router_rows", "router_rows+bias", "bias"] = "router_rows"
    sequential: bool = True
    batch_size: int = 16

    def __post_init__(self) -> None:
        self._require("batch_size", self.batch_size > 0, "must be greater than 0")
        self._require("ridge", self.ridge >= 0, "must be at least 0")
        self._check("trains")


Settings = RouterKD | Ridge
