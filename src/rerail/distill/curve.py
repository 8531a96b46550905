"""Reports the KL of a fit while it runs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning

Report = Callable[[Mapping[str, float], int], None]


class CurveReporter(lightning.Callback):
    """Reports {step, batch_kl} after optimiser steps, {step, train_kl, val_kl} after validations.

    Steps are counted from 1; the validation before the first step has step 0. `batch_kl` is the
    mean over the batches of the step, `train_kl` that over the batches since the last validation;
    both and `val_kl` are in nats a token.

    Args:
        report: called with each point and the steps of the whole fit, on the first process only;
            must not raise.
    """

    def __init__(self, report: Report):
        self.report = report
        self._step = 0
        self._batch_kls: list[float] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step  # not 0 where the fit goes on from a checkpoint

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch_kls.append(float(trainer.callback_metrics.get("train_kl", math.nan)))
        if trainer.global_step == self._step:  # gradients still add up over micro-batches
            return
        # the logged KL is of this process's share; the curve's is of all
        self._step, kls = trainer.global_step, self._batch_kls
        self._batch_kls = []
        if trainer.is_global_zero:
            self.report({"step": self._step, "batch_kl": sum(kls) / len(kls)}, pl_module.steps)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.report(dict(pl_module.curve[-1]), pl_module.steps)
