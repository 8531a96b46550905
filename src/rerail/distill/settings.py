"""The hyper-parameters of a repair; the dataclass is its config."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from rerail.errors import InputError


@dataclass(frozen=True)
class RouterKD:
    """Router KD (arXiv 2603.02217, table 1 for the preset `router_kd_paper`).

    Attributes:
        enabled: false skips the repair.
        learning_rate, weight_decay, warmup: of AdamW; warm-up in steps.
        schedule: `constant`, or `cosine` down to a tenth.
        temperature: tau.
        epochs: passes over the calibration text.
        batch_size, accumulate: sequences a forward, forwards an optimiser step.
        average: `sequence` (the paper's N_x) or `token`.
        teacher: `cached` final hidden states (exact), or `live`.
        trains: `router_rows`, or `router_rows+bias` where the family's routers have a trained bias.
        validation: share of the calibration blocks held out to choose the best step.
        evaluations: how often the validation KL is computed during training, at most.
        chunk: tokens at a time in the KL; by default 128 on a CPU and 256 on a GPU.
        clip: gradient norm limit, 0 for none.
    """

    enabled: bool = True
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
    validation: float = 0.125
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
        inside = 0 < self.validation < 1
        self._require("validation", inside, "must lie between 0 and 1, both excluded")
        for name in ("schedule", "average", "teacher", "trains"):
            words = get_args(get_type_hints(type(self))[name])
            known = getattr(self, name) in words
            self._require(name, known, f"is not one of {', '.join(words)}")

    def _require(self, name: str, condition: bool, reason: str) -> None:
        if not condition:
            raise InputError(f"distill.{name}={getattr(self, name)!r} {reason}")
