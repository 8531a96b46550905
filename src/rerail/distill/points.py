"""The points of a fit as they come, for whoever shows them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning


class Points(lightning.Callback):
    """Hands on {step, batch_kl} after optimiser steps, {step, train_kl, val_kl} after validations.

    Steps are counted from 1; the validation before the first step has step 0. `batch_kl` is the
    mean over the batches of the step, `train_kl` that over the batches since the last validation.

    Args:
        tell: called with each point, on the first process only; must not raise.
    """

    def __init__(self, tell: Callable[[Mapping[str, float]], None]):
        self.tell = tell
        self._step = 0
        self._seen: list[float] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Count from where the fit goes on."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand on the step's KL when the optimiser has stepped."""
        self._seen.append(float(trainer.callback_metrics.get("train_kl", math.nan)))
        if trainer.global_step == self._step:
            return
        self._step, seen = trainer.global_step, self._seen
        self._seen = []
        if trainer.is_global_zero:
            self.tell({"step": self._step, "batch_kl": sum(seen) / len(seen)})

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Hand on the newest point of the curve."""
        if trainer.is_global_zero:
            self.tell(dict(pl_module.curve[-1]))
