"""Repair a student: fit the router, keep the best step, say what happened."""

import contextlib
import dataclasses
import logging
import pickle
import warnings
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from rerail.data.calibration import CalibrationData, TokenBlocks
from rerail.distill.masters import masters
from rerail.distill.router_distillation import RouterDistillation
from rerail.distill.schedule import Schedule
from rerail.distill.settings import RouterKD
from rerail.errors import InputError
from rerail.files import digest, whole_file
from rerail.moe.layer import MoEModel
from rerail.teacher.teacher import Teacher

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        kl_first, kl_best, kl_last: validation KL a token before, at the best and at the last step.
        best_step, steps: in optimiser steps.
        curve: {step, train_kl, val_kl} points.
        before, after: router rows (and biases) by name, float32; `after` is the best step's.
    """

    kl_first: float
    kl_best: float
    kl_last: float
    best_step: int
    steps: int
    curve: list[dict[str, float]]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


class _Rounds(CalibrationData):
    """Hands out the blocks that train round by round, in an order that the seed decides."""

    def __init__(self, blocks: TokenBlocks, schedule: Schedule, seed: int):
        super().__init__(blocks, schedule.train_blocks, schedule.batch_size, seed)
        self.schedule = schedule

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the round that begins at the trainer's optimiser step."""
        assert self.trainer is not None
        blocks = self.schedule.blocks_after(self.trainer.global_step, self.seed)
        return DataLoader(Subset(self.train, blocks), self.batch_size, num_workers=0)


class _Checkpoint(lightning.Callback):
    """Writes after every round where the fit stands, whole or not at all."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Write it."""
        with whole_file(self.path) as temporary:
            trainer.save_checkpoint(temporary)


def repair(  # noqa: PLR0913
    student: MoEModel,
    teacher: Teacher,
    blocks: TokenBlocks,
    settings: RouterKD,
    trainer: dict[str, Any],
    seed: int,
    folder: Path | None = None,
) -> Repair:
    """Train the student's routers in place on calibration blocks, by Lightning.

    Args:
        student: the compressed model; only its router rows change.
        teacher: the source of the teacher's hidden states for these blocks.
        blocks: calibration text; its last share validates.
        settings: hyper-parameters.
        trainer: further arguments of lightning.Trainer.
        seed: of the order of the blocks.
        folder: of this student, where a killed fit leaves what the next call goes on from, with the
            same result as a fit that was never killed; None keeps nothing.

    Raises:
        InputError: too few blocks, constant gate weights, an argument of the trainer that the
            settings decide, a precision that casts the masters, or a KL that is not finite.
    """
    schedule = Schedule.of(len(blocks), settings)
    student.model.train(False)
    with masters(student, settings.trains) as trained:
        before = {n: p.detach().clone() for n, p in trained.items()}
        module = RouterDistillation(student, teacher, settings, trained, schedule.steps)
        held = None
        if folder is not None:
            choices = [dataclasses.asdict(settings), seed, blocks.fingerprint]
            rows = [sha256(t.cpu().numpy().tobytes()).hexdigest() for t in before.values()]
            held = folder / f"repair-{digest([choices, rows])}.ckpt"
        _fit(module, _Rounds(blocks, schedule, seed), trainer, held)
        after = {n: p.detach().clone() for n, p in trained.items()}
    curve = module.curve
    first, last = curve[0]["val_kl"], curve[-1]["val_kl"]
    made = int(curve[-1]["step"])
    return Repair(first, module.best[0], last, module.best[1], made, curve, before, after)


def _fit(
    module: RouterDistillation, data: _Rounds, given: dict[str, Any], held: Path | None
) -> None:
    """Fit in rounds (Lightning's epochs), from `held` where it is sound; remove it at the end."""
    settings, schedule = module.settings, data.schedule
    start = held if held is not None and _sound(held) else None
    fixed: dict[str, Any] = {
        "max_epochs": schedule.rounds,
        "reload_dataloaders_every_n_epochs": 1,
        "accumulate_grad_batches": settings.accumulate,
        "gradient_clip_val": settings.clip or None,
        "num_sanity_val_steps": 0 if start else -1,  # the validation of step 0
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    if clash := sorted(fixed.keys() & given.keys()):
        raise InputError(f"trainer.{clash[0]} is decided by the settings of distill; leave it out")
    callbacks = [*given.get("callbacks", []), *([_Checkpoint(held)] if held is not None else [])]
    free = {"logger": False, "log_every_n_steps": 1, **given, "callbacks": callbacks}
    with _quiet(), torch.enable_grad():
        lightning.Trainer(**fixed, **free).fit(module, datamodule=data, ckpt_path=start)
    if held is not None:
        held.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advice (more workers, other loggers) to itself."""
    voice = logging.getLogger("lightning.pytorch")
    level = voice.level
    voice.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
            yield
    finally:
        voice.setLevel(level)


def _sound(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
        log.warning("%s is damaged, so the repair starts over", path)
        return False
    log.info("going on with the repair in %s", path)
    return True
