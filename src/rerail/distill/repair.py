"""Repair a student: fit the router, keep the best step, say what happened."""

import dataclasses
import math
from typing import Any

import lightning
import torch
from torch import Tensor

from rerail.data.calibration import CalibrationData, TokenBlocks
from rerail.distill.masters import masters
from rerail.distill.router_distillation import RouterDistillation
from rerail.distill.settings import RouterKD
from rerail.errors import InputError
from rerail.moe.layer import MoEModel
from rerail.teacher.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        kl_first, kl_best, kl_last: validation KL a token before, at the best and at the last step.
        best_step, steps: in optimiser steps.
        curve: {step, train_kl, val_kl} points.
        before, after: router rows (and biases) by name.
    """

    kl_first: float
    kl_best: float
    kl_last: float
    best_step: int
    steps: int
    curve: list[dict[str, float]]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def split_blocks(blocks: TokenBlocks, validation: float, batch_size: int) -> int:
    """Return how many leading blocks train; the others validate.

    Raises:
        InputError: there are too few blocks for both.
    """
    held = max(1, round(len(blocks) * validation))
    train = len(blocks) - held
    if train < batch_size:
        raise InputError(
            f"{len(blocks)} calibration blocks leave {train} to train on, fewer than distill.batch_size="
            f"{batch_size}; ask for more samples or a smaller batch"
        )
    return train


def repair(
    student: MoEModel,
    teacher: Teacher,
    blocks: TokenBlocks,
    settings: RouterKD,
    trainer: dict[str, Any],
    seed: int,
) -> Repair:
    """Train the student's routers in place on calibration blocks, by Lightning.

    Args:
        student: the compressed model; only its router rows change.
        teacher: the source of the teacher's hidden states for these blocks.
        blocks: calibration text; its last share validates.
        settings: hyper-parameters.
        trainer: further arguments of lightning.Trainer.
        seed: of the order of the blocks.
    """
    train = split_blocks(blocks, settings.validation, settings.batch_size)
    batches = train // settings.batch_size
    a_epoch = math.ceil(batches / settings.accumulate)
    steps = a_epoch * settings.epochs
    every = max(1, batches * settings.epochs // settings.evaluations)
    data = CalibrationData(blocks, train_blocks=train, batch_size=settings.batch_size, seed=seed)
    student.model.eval()
    with masters(student, settings.trains) as trained:
        before = {n: p.detach().clone() for n, p in trained.items()}
        module = RouterDistillation(student, teacher, settings, trained, steps)
        fit = lightning.Trainer(
            max_epochs=settings.epochs,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.clip or None,
            val_check_interval=every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            **{"logger": False, "log_every_n_steps": 1, **trainer},
        )
        with torch.enable_grad():
            fit.validate(module, datamodule=data, verbose=False)
            fit.fit(module, datamodule=data)
        if module.curve[-1]["step"] != module.global_step:
            fit.validate(module, datamodule=data, verbose=False)
        after = {n: p.detach().clone() for n, p in trained.items()}
    first, last = module.curve[0]["val_kl"], module.curve[-1]["val_kl"]
    return Repair(first, module.best[0], last, module.best[1], steps, module.curve, before, after)
