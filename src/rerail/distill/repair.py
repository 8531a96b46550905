"""Repair a student: fit the router, keep the best step, say what happened."""

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from rerail.code_version import version_of
from rerail.distill.batches import Rounds
from rerail.distill.masters import masters, selected
from rerail.distill.preemption import Checkpoints
from rerail.distill.router_distillation import RouterDistillation
from rerail.distill.schedule import Schedule
from rerail.distill.settings import RouterKD
from rerail.distill.sharding import private_copy
from rerail.distill.strategies import check_strategy, strategy_of
from rerail.errors import InputError
from rerail.files import digest
from rerail.moe.model import MoEModel
from rerail.parallel import barrier, first, is_first, join, joined
from rerail.store import is_sound, remove_sealed
from rerail.teacher.hidden_states import Teacher
from rerail.text.calibration import TokenBlocks

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        kl_first, kl_best, kl_last: validation KL a token before, at the best and at the last step.
        best_step, steps: in optimiser steps.
        curve: {step, train_kl, val_kl} points.
        before, after: router rows (and biases) by name, float32 on the CPU; `after` is the best
            step's.
    """

    kl_first: float
    kl_best: float
    kl_last: float
    best_step: int
    steps: int
    curve: list[dict[str, float]]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


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
    check_strategy(trainer, settings)
    join()
    rank, ranks = joined()
    schedule = Schedule.of(len(blocks), settings, ranks)
    student.model.train(False)
    sharded = trainer.get("strategy") == "fsdp2"
    trainee = private_copy(student) if sharded else student
    # DDP takes the mean over processes, sharded masters the sum; both that over a step's forwards
    scale = schedule.forwards / settings.accumulate * (1 if sharded else ranks)
    with masters(trainee, settings.trains) as trained:
        before = {n: p.detach().to("cpu", copy=True) for n, p in trained.items()}
        module = RouterDistillation(trainee, teacher, settings, trained, schedule.steps, scale)
        code = version_of(RouterDistillation, Rounds)
        choices = [dataclasses.asdict(settings), seed, blocks.fingerprint, ranks, code]
        held = None if folder is None else folder / _name(choices, before)
        data = Rounds(blocks, schedule, seed, settings.average, rank)
        _fit(module, data, trainer, held)
        after = {n: t.cpu() for n, t in zip(trained, module.rows().values(), strict=True)}
    if sharded:
        put_rows(student, after)
    curve = module.curve
    first_kl, last_kl = curve[0]["val_kl"], curve[-1]["val_kl"]
    made = int(curve[-1]["step"])
    return Repair(first_kl, module.best[0], last_kl, module.best[1], made, curve, before, after)


def _name(choices: list[Any], before: Mapping[str, Tensor]) -> str:
    """Return the file name of a fit's checkpoint: another fit never goes on from it."""
    rows = [sha256(t.cpu().numpy().tobytes()).hexdigest() for t in before.values()]
    return f"repair-{digest([choices, rows])}.ckpt"


def put_rows(student: MoEModel, rows: Mapping[str, Tensor]) -> None:
    """Put repaired rows (and biases), named as in `Repair.after`, into a student."""
    for layer in student.layers:
        for owner, part in selected(layer, "router_rows+bias"):
            new = rows.get(f"layers.{layer.index}.router.{part}")
            if new is not None:
                old = getattr(owner, part)
                owner._parameters[part] = torch.nn.Parameter(new.to(old), requires_grad=False)


def _fit(
    module: RouterDistillation, data: Rounds, given: dict[str, Any], held: Path | None
) -> None:
    """Fit in rounds (Lightning's epochs), from `held` where it is sound; remove it at the end."""
    settings, schedule = module.settings, data.schedule
    start = held if held and first(lambda: _can_go_on_from(held)) else None
    fixed: dict[str, Any] = {
        "max_epochs": schedule.rounds,
        "reload_dataloaders_every_n_epochs": 1,
        "accumulate_grad_batches": schedule.forwards,
        "gradient_clip_val": settings.clip or None,
        "num_sanity_val_steps": 0 if start else -1,  # the validation of step 0
        "use_distributed_sampler": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    if clash := sorted(fixed.keys() & given.keys()):
        raise InputError(f"trainer.{clash[0]} is decided by the settings of distill; leave it out")
    keeper = [Checkpoints(held)] if held is not None else []
    free = {"logger": False, "log_every_n_steps": 1, **given, **strategy_of(given)}
    free["callbacks"] = [*given.get("callbacks", []), *keeper]
    try:
        with _quiet(), torch.enable_grad():
            lightning.Trainer(**fixed, **free).fit(module, datamodule=data, ckpt_path=start)
    finally:
        for one in keeper:
            one.close()
    barrier()
    if held is not None and is_first():
        remove_sealed(held)


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
            warnings.filterwarnings("ignore", ".*srun. command is available.*")
            yield
    finally:
        voice.setLevel(level)


def _can_go_on_from(path: Path) -> bool:
    if is_sound(path):
        log.info("going on with the repair in %s", path)
        return True
    return False
