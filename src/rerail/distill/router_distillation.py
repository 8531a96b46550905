"""Router KD as a LightningModule: freeze everything but the router, minimise the KL to the teacher.

    L(x) = tau^2 / N_x  sum_t m_{t+1} KL( p_T(. | x_<=t) || p_S(. | x_<=t) ),   N_x = sum_t m_{t+1}

over unlabelled text x with mask m (arXiv 2603.02217, section 4, eq. 1-3). The gradient reaches the
router through the gate weights of the chosen experts; no weight gradient of an expert is computed.
The validation KL is taken before the first step too, and the best step is the one that is kept, so
a repair that does not help changes nothing and shows as such.
"""

import math
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from rerail.distill.settings import RouterKD
from rerail.moe.layer import MoEModel
from rerail.teacher.kl import chunked_kl, target_weights, token_kl
from rerail.teacher.teacher import Teacher


class RouterDistillation(lightning.LightningModule):
    """Holds the student, and the teacher outside its parameters.

    Args:
        student: the compressed model.
        teacher: source of the teacher's final hidden states; not a submodule.
        settings: hyper-parameters.
        trained: the trainable parameters, from `rerail.distill.masters`.
        steps: optimiser steps of the whole fit, for the schedule.
    """

    strict_loading = False

    def __init__(
        self,
        student: MoEModel,
        teacher: Teacher,
        settings: RouterKD,
        trained: dict[str, nn.Parameter],
        steps: int,
    ):
        super().__init__()
        self.model = student.model
        self._student = [student]
        self._teacher = [teacher]
        self.settings = settings
        self.trained = trained
        self.steps = steps
        self.curve: list[dict[str, float]] = []
        self.best: tuple[float, int, dict[str, Tensor]] = (math.inf, 0, {})
        self._sums = [0.0, 0.0]
        self._train = [0.0, 0]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return L averaged over the batch's sequences (or tokens, by `average`)."""
        student, teacher, mask = self._states(batch)
        weights = target_weights(batch["mask"], self.settings.average)[mask]
        head, tau = self._student[0].head, self.settings.temperature
        return chunked_kl(
            student, teacher, weights, head, temperature=tau, chunk=self.settings.chunk
        )

    def _states(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = batch["input_ids"], batch["mask"]
        teacher = self._teacher[0].hidden(batch["index"], ids, mask)
        student = self._student[0].hidden(ids, mask)
        valid = mask[:, 1:]
        return student[:, :-1][valid], teacher[:, :-1][valid].to(student), valid

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One forward of the student, and the KL to the teacher."""
        loss = self.loss(batch)
        self._train[0] += float(loss.detach())
        self._train[1] += 1
        self.log("train_kl", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add up the KL of held-out calibration blocks, per token."""
        student, teacher, _ = self._states(batch)
        kl = token_kl(
            student, teacher, self._student[0].head, self.settings.temperature, self.settings.chunk
        )
        self._sums[0] += float(kl.double().sum())
        self._sums[1] += len(kl)

    def on_validation_epoch_start(self) -> None:
        """Start a new mean."""
        self._sums = [0.0, 0.0]

    def on_validation_epoch_end(self) -> None:
        """Keep the masters when this is the best step so far (step 0 included)."""
        kl = self._sums[0] / max(self._sums[1], 1)
        train = self._train[0] / self._train[1] if self._train[1] else kl
        self._train = [0.0, 0]
        self.curve.append({"step": self.global_step, "train_kl": train, "val_kl": kl})
        self.log("val_kl", kl, prog_bar=True)
        if kl < self.best[0]:
            held = {n: p.detach().clone() for n, p in self.trained.items()}
            self.best = (kl, self.global_step, held)

    def on_fit_end(self) -> None:
        """Put the best step's masters back."""
        with torch.no_grad():
            for name, value in self.best[2].items():
                self.trained[name].copy_(value)

    def configure_optimizers(self) -> Any:
        """AdamW on the selected parameters only."""
        s = self.settings
        adam = torch.optim.AdamW(
            self.trained.values(), lr=s.learning_rate, weight_decay=s.weight_decay
        )

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / s.warmup) if s.warmup else 1.0
            if s.schedule == "constant":
                return warm
            return warm * (
                0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.steps))))
            )

        schedule = torch.optim.lr_scheduler.LambdaLR(adam, factor)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what trains; the rest is the teacher's and the plan's."""
        kept = {id(p) for p in self.trained.values()}
        names = {n for n, p in self.named_parameters() if id(p) in kept}
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in names}
