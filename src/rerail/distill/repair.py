"""Repair a student: fit the router, keep the best step, say what happened."""

import dataclasses
import logging
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rerail.code_version import code_version
from rerail.distill.making import fixed_arguments, make_trainer, quiet
from rerail.distill.schedule import Schedule
from rerail.distill.settings import Ridge, RouterKD, Settings
from rerail.distill.sharding import private_copy
from rerail.distill.trainable import master_copies, select_parameters
from rerail.distill.trainer import check_strategy, strategy_arguments
from rerail.errors import InputError
from rerail.files import digest, refusals
from rerail.moe.model import MoEModel
from rerail.parallel import barrier, broadcast_from_first, group_rank_and_size, is_first, join
from rerail.store import is_sound, remove_sealed
from rerail.teacher.hidden_states import LiveTeacher, Teacher
from rerail.text.calibration import TokenBlocks

if TYPE_CHECKING:  # Lightning takes seconds to import: functions that train import it
    from rerail.distill.batches import Rounds
    from rerail.distill.curve import Report
    from rerail.distill.router_distillation import RouterDistillation

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Repair:
    """What a repair did. A KL is in nats a token, on the validation blocks.

    Attributes:
        kl_first, kl_best, kl_last: validation KL before, at the best and at the last step.
        best_step, steps: in optimiser steps.
        curve: {step, train_kl, val_kl} points.
        before, after: router rows (E, H) (and biases (E,)) by name, float32 on the CPU; `after`
            is the best step's.
    """

    kl_first: float
    kl_best: float
    kl_last: float
    best_step: int
    steps: int
    curve: list[dict[str, float]]
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    @classmethod
    def from_plain(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Repair":
        """Return the repair that `plain` and `tensors` took apart."""
        rows: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}}
        for name, tensor in tensors.items():
            side, _, row = name.partition(".")
            rows[side][row] = tensor
        return cls(**data, before=rows["before"], after=rows["after"])

    def plain(self) -> dict[str, Any]:
        """Return the numbers and the curve as JSON has them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if name not in ("before", "after")}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The router rows, named `before.<name>` and `after.<name>`."""
        sides = {"before": self.before, "after": self.after}
        return {f"{side}.{name}": row for side, rows in sides.items() for name, row in rows.items()}


def repair(  # noqa: PLR0913
    student: MoEModel,
    teacher: Teacher,
    blocks: TokenBlocks,
    settings: Settings,
    trainer: Mapping[str, Any],
    seed: int,
    folder: Path | None = None,
    report: "Report | None" = None,
) -> Repair:
    """Train the student's routers in place on calibration blocks, by Lightning, or solve for them.

    Args:
        student: the compressed model; only its router rows change.
        teacher: the source of the teacher's hidden states for these blocks; a live one for `Ridge`.
        blocks: calibration text; its last share validates.
        settings: hyper-parameters.
        trainer: further arguments of lightning.Trainer.
        seed: of the order of the blocks.
        folder: of checkpoints, from which a killed fit goes on to the same result; None for none.
        report: called with each point and the steps of the fit, as in `curve.CurveReporter`.

    Raises:
        InputError: too few blocks, constant gate weights, a trainer argument or precision that the
            settings rule out, or a KL that is not finite.
    """
    check_strategy(trainer, settings)
    join()
    if isinstance(settings, Ridge):
        from rerail.distill.ridge import ridge_repair  # it reads this module

        assert isinstance(teacher, LiveTeacher)
        return ridge_repair(student, teacher.model, blocks, settings, report)
    return _train(student, teacher, blocks, settings, trainer, seed, folder, report)


def _train(  # noqa: PLR0913
    student: MoEModel,
    teacher: Teacher,
    blocks: TokenBlocks,
    settings: RouterKD,
    trainer: Mapping[str, Any],
    seed: int,
    folder: Path | None,
    report: "Report | None",
) -> Repair:
    from rerail.distill.batches import Rounds
    from rerail.distill.router_distillation import RouterDistillation

    rank, ranks = group_rank_and_size()
    schedule = Schedule.of(len(blocks), settings, ranks)
    student.model.train(False)
    sharded = trainer.get("strategy") == "fsdp2"
    # FSDP2 moves and cuts parameters in place, and the teacher shares them
    trainee = private_copy(student) if sharded else student
    scale = _loss_scale(schedule, settings, sharded)
    with master_copies(trainee, settings.trains) as trained:
        before = {n: p.detach().to("cpu", copy=True) for n, p in trained.items()}
        module = RouterDistillation(trainee, teacher, settings, trained, schedule.steps, scale)
        data = Rounds(blocks, schedule, seed, settings.average, rank)
        code = code_version(RouterDistillation, Rounds)
        choices = [dataclasses.asdict(settings), seed, blocks.fingerprint, ranks, code]
        checkpoint = folder and folder / _checkpoint_name(choices, before)
        _fit(module, data, trainer, report, checkpoint)
        done = _describe(module, before)
    if sharded:
        set_router_rows(student, done.after)
    return done


def _describe(module: "RouterDistillation", before: dict[str, Tensor]) -> Repair:
    first, last = module.curve[0], module.curve[-1]
    best_kl, best_step, _ = module.best
    return Repair(
        kl_first=first["val_kl"],
        kl_best=best_kl,
        kl_last=last["val_kl"],
        best_step=best_step,
        steps=int(last["step"]),
        curve=module.curve,
        before=before,
        # the module names its masters otherwise, and in the same order
        after={n: t.cpu() for n, t in zip(before, module.copies().values(), strict=True)},
    )


def _loss_scale(schedule: Schedule, settings: RouterKD, sharded: bool) -> float:
    """Return the factor of the loss that makes an optimiser step the mean over its own batches.

    Lightning divides gradients by the forwards of one process. DDP averages them over processes,
    sharded masters add them up. The factor undoes both, so that a step is the same however many
    processes share its batches.
    """
    return schedule.forwards / settings.accumulate * (1 if sharded else schedule.ranks)


def _checkpoint_name(choices: list[Any], before: Mapping[str, Tensor]) -> str:
    """Return the file name of a fit's checkpoint: another fit never goes on from it."""
    rows = [sha256(t.cpu().numpy().tobytes()).hexdigest() for t in before.values()]
    return f"repair-{digest([choices, rows])}.ckpt"


def set_router_rows(student: MoEModel, rows: Mapping[str, Tensor]) -> None:
    """Put repaired rows (and biases), named as in `Repair.after`, into a student."""
    for layer in student.layers:
        for owner, name in select_parameters(layer, "router_rows+bias"):
            new = rows.get(f"layers.{layer.index}.router.{name}")
            if new is not None:
                # a new Parameter: the old one may be the teacher's, too
                old = getattr(owner, name)
                owner._parameters[name] = torch.nn.Parameter(new.to(old), requires_grad=False)


def _fit(
    module: "RouterDistillation",
    data: "Rounds",
    trainer: Mapping[str, Any],
    report: "Report | None",
    checkpoint: Path | None,
) -> None:
    """Fit in rounds (Lightning's epochs), from a checkpoint where it is sound; it goes at the end.

    Raises:
        InputError: an argument of the trainer cannot be used.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from rerail.distill.curve import CurveReporter
    from rerail.distill.preemption import Checkpoints

    start = None
    if checkpoint is not None and broadcast_from_first(lambda: is_sound(checkpoint)):
        start = checkpoint
        log.info("going on with the repair in %s", checkpoint)
    fixed = fixed_arguments(data.schedule, module.settings, resumes=start is not None)
    reporters = [] if report is None else [CurveReporter(report)]
    checkpoints = [] if checkpoint is None else [Checkpoints(checkpoint)]
    try:
        with quiet(), torch.enable_grad():
            # checkpoints last: a step is reported before it is saved and the process handed over
            callbacks = [*reporters, *checkpoints]
            made = make_trainer(trainer, fixed, callbacks, **strategy_arguments(trainer))
            with refusals(Path(made.default_root_dir)):  # of loggers and profilers
                made.fit(module, datamodule=data, ckpt_path=start)
    except MisconfigurationException as error:
        raise InputError(f"trainer: {str(error).splitlines()[0]}") from error
    finally:
        for callback in checkpoints:
            callback.close()
    barrier()
    if checkpoint is not None and is_first():
        remove_sealed(checkpoint)
