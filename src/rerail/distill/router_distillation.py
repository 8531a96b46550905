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

from rerail.distill.batches import Batch
from rerail.distill.settings import RouterKD
from rerail.distill.sharding import copy_into, full_copy, shard_student
from rerail.errors import InputError
from rerail.moe.model import MoEModel
from rerail.parallel import gather, group_rank_and_size
from rerail.teacher.hidden_states import Teacher
from rerail.teacher.kl import chunked_kl, target_weights, token_kl


class RouterDistillation(lightning.LightningModule):
    """Trains masters; student and teacher are not among its parameters.

    Student and teacher share tensors and may be spread over devices, so Lightning must neither move
    nor save them: what it sees, moves and writes to checkpoints are the masters alone. Where
    several processes fit together, each has its share of every optimiser step's blocks; all numbers
    are those of all processes.

    Args:
        student: the compressed model, in eval mode, as its teacher.
        teacher: source of the teacher's final hidden states.
        settings: hyper-parameters.
        trained: the trainable parameters, from `rerail.distill.trainable`.
        steps: optimiser steps of the whole fit, for the schedule.
        scale: of the loss that is trained on, so that its mean over the forwards of an optimiser
            step (and over processes, where the strategy takes one) is that of a single process.

    Attributes:
        curve: {step, train_kl, val_kl} at every validation; the first is step 0.
        best: validation KL, step and masters of the best validation.
    """

    def __init__(
        self,
        student: MoEModel,
        teacher: Teacher,
        settings: RouterKD,
        trained: dict[str, nn.Parameter],
        steps: int,
        scale: float = 1.0,
    ):
        super().__init__()
        self._student = [student]  # in lists, where nn.Module does not look for parameters
        self._teacher = [teacher]
        self.settings = settings
        self.masters = nn.ParameterDict({n.replace(".", "_"): p for n, p in trained.items()})
        self.steps = steps
        self.scale = scale
        self.sharded = False
        self.curve: list[dict[str, float]] = []
        self.best: tuple[float, int, dict[str, Tensor]] = (math.inf, 0, {})
        self._validation = (0.0, 0)
        self._train = (0.0, 0)

    def configure_model(self) -> None:
        """Shard the student where the strategy gives a mesh of processes (FSDP2)."""
        if self.device_mesh is not None and not self.sharded:
            shard_student(self._student[0], self.masters, self.device_mesh["data_parallel"])
            self.sharded = True

    def loss(self, batch: Batch) -> Tensor:
        """Return L averaged over the batch's sequences (or tokens, by `average`).

        Where a batch is a share of a larger one, its `weights` (B, S-1) say how its targets count.
        """
        student, teacher, valid = self._states(batch)
        weights = batch.get("weights")
        if weights is None:
            weights = target_weights(batch["mask"], self.settings.average)
        weights = weights.to(valid.device)[valid]
        head, s = self._student[0].head, self.settings
        return chunked_kl(student, teacher, weights, head, temperature=s.temperature, chunk=s.chunk)

    def _states(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return both final hidden states (N, H) at the N targets, and where they are (B, S-1)."""
        device = next(self._student[0].model.parameters()).device
        ids, mask = batch["input_ids"].to(device), batch["mask"].to(device)
        teacher = self._teacher[0].hidden(batch["index"], ids, mask)
        student = self._student[0].hidden(ids, mask)
        valid = mask[:, 1:].to(student.device)  # position t predicts t + 1; the last, nothing
        return student[:, :-1][valid], teacher[:, :-1].to(student)[valid], valid

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        blocks = int(batch["weights"].any(dim=1).sum())  # without those that only fill a share
        self._train = (self._train[0] + float(loss.detach()), self._train[1] + blocks)
        self.log("train_kl", loss.detach(), prog_bar=True)
        return loss * self.scale

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        student, teacher, valid = self._states(batch)
        head, s = self._student[0].head, self.settings
        # float64 sums, so that batches and processes may be cut in any way
        kl = token_kl(student, teacher, head, s.temperature, s.chunk).double()
        counts = batch["weights"].to(valid.device)[valid]
        self._validation = (
            self._validation[0] + float((kl * counts).sum()),
            self._validation[1] + int(counts.sum()),
        )

    def on_validation_epoch_end(self) -> None:
        """Keep the masters when this is the best step so far (step 0 included).

        Raises:
            InputError: the KL is not finite before the first step.
        """
        total, targets = map(sum, zip(*gather(self._validation), strict=True))
        kl = total / max(targets, 1)
        # a loss divides by the size of its whole batch, of which a process may have only a share
        losses, blocks = map(sum, zip(*gather(self._train), strict=True))
        train = losses / (blocks / self.settings.batch_size) if blocks else kl
        self._validation = self._train = (0.0, 0)
        if not math.isfinite(kl):
            if not self.curve:
                raise InputError(
                    f"the KL from teacher to student is {kl} before the first step, so teacher or "
                    "student give logits that are not finite; repair needs finite ones"
                )
            self.trainer.should_stop = True  # it has diverged; the best step is kept
        self.curve.append({"step": self.global_step, "train_kl": train, "val_kl": kl})
        self.log("val_kl", kl, prog_bar=True, sync_dist=True)
        if kl < self.best[0]:  # false for nan, too: a fit that diverges keeps its best step
            self.best = (kl, self.global_step, self.copies())

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the masters by name, complete on every process."""
        return {n: full_copy(p) for n, p in self.masters.items()}

    @torch.no_grad()
    def on_fit_end(self) -> None:
        """Put the best step's masters back."""
        for name, value in self.best[2].items():
            copy_into(self.masters[name], value)

    def configure_optimizers(self) -> Any:
        s = self.settings
        adam = torch.optim.AdamW(
            self.masters.values(), lr=s.learning_rate, weight_decay=s.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, self._factor)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _factor(self, step: int) -> float:
        """Return the learning rate of a step over `learning_rate`."""
        s = self.settings
        warmup = min(1.0, (step + 1) / s.warmup) if s.warmup else 1.0
        if s.schedule == "constant":
            return warmup
        # a cosine from 1 at the first step to 0.1 at the last
        return warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.steps)))))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"], checkpoint["best"] = self.curve, self.best
        checkpoint["train"] = gather(self._train)  # one a process; each takes its own back

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve, self.best = checkpoint["curve"], checkpoint["best"]
        self._train = tuple(checkpoint["train"][group_rank_and_size()[0]])
