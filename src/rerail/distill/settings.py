"""The hyper-parameters of a repair; the dataclass is its config."""

from dataclasses import dataclass
from typing import Literal

from rerail.errors import InputError


@dataclass(frozen=True)
class RouterKD:
    """Router KD (arXiv 2603.02217, table 1 for the preset `router_kd_paper`).

    Attributes:
        enabled: false skips the repair.
        learning_rate, weight_decay, warmup, schedule: of AdamW; warm-up in steps; `constant` or `cosine`.
        temperature: tau.
        epochs: passes over the calibration text.
        batch_size, accumulate: sequences a forward, forwards an optimiser step.
        average: `sequence` (the paper's N_x) or `token`.
        teacher: `cached` final hidden states (exact), or `live`.
        trains: `router_rows`, or `router_rows+bias` where the family's routers have a trained bias.
        validation: share of the calibration blocks held out to choose the best step.
        evaluations: how often the validation KL is computed during training.
        chunk: tokens at a time in the KL.
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
    chunk: int = 128
    clip: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers before anything is loaded."""
        positive = (
            "learning_rate",
            "temperature",
            "epochs",
            "batch_size",
            "accumulate",
            "chunk",
            "evaluations",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise InputError(f"distill.{name}={getattr(self, name)} must be greater than 0")
        if not 0 < self.validation < 1:
            raise InputError(
                f"distill.validation={self.validation} must lie between 0 and 1, both excluded"
            )
        for name, allowed in (
            ("schedule", ("constant", "cosine")),
            ("average", ("sequence", "token")),
            ("teacher", ("cached", "live")),
            ("trains", ("router_rows", "router_rows+bias")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"distill.{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
