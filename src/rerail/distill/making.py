"""The lightning.Trainer of a fit: made when it fits, and made once before any model is loaded.

So its arguments are checked by Lightning's own annotations and code. Lightning takes seconds to
import, and most commands never train: functions import it when called.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_type_hints

import torch

from rerail.config.fields import check_value
from rerail.distill.schedule import Schedule
from rerail.distill.settings import RouterKD
from rerail.errors import InputError
from rerail.parallel import rank_and_size

if TYPE_CHECKING:
    import lightning


def fixed_arguments(
    schedule: Schedule, settings: RouterKD, *, resumes: bool = False
) -> dict[str, Any]:
    """Return the arguments that the settings of a repair decide, for a fit that goes on or not."""
    return {
        "max_epochs": schedule.rounds,
        "reload_dataloaders_every_n_epochs": 1,
        "accumulate_grad_batches": schedule.forwards,
        "gradient_clip_val": settings.clip or None,
        "num_sanity_val_steps": 0 if resumes else -1,  # the validation of step 0
        "use_distributed_sampler": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }


def make_trainer(
    trainer: Mapping[str, Any],
    fixed: Mapping[str, Any],
    callbacks: Sequence[Any] = (),
    **here: Any,
) -> "lightning.Trainer":
    """Return the trainer of a fit.

    Args:
        trainer: arguments of lightning.Trainer.
        fixed: those that the settings decide.
        callbacks: further ones, called last.
        here: arguments that win, because of where the fit runs.

    Raises:
        InputError: an argument is decided by the settings, does not fit its annotation, is refused
            by Lightning, or casts the router's masters.
    """
    import lightning

    if clash := sorted(fixed.keys() & trainer.keys()):
        raise InputError(f"trainer.{clash[0]} is decided by the settings of distill; leave it out")
    hints = get_type_hints(lightning.Trainer.__init__)
    for name, value in trainer.items():
        check_value(value, hints.get(name, Any), f"trainer.{name}")
    first = trainer.get("callbacks") or []
    first = [*first] if isinstance(first, list | tuple) else [first]
    free = {"logger": False, "log_every_n_steps": 1, **trainer, **here}
    try:
        made = lightning.Trainer(**fixed, **{**free, "callbacks": [*first, *callbacks]})
    except Exception as error:  # each argument is checked by another part of Lightning
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"trainer: Lightning cannot be used so: {reason}") from error
    masters = made.precision_plugin.convert_module(torch.nn.Linear(1, 1))
    if any(p.dtype != torch.float32 for p in masters.parameters()):
        raise InputError(
            f"trainer.precision={made.precision!r} casts the router's float32 masters, and in 16 "
            "bits small steps are lost; use 32-true, bf16-mixed or 16-mixed"
        )
    return made


def check_arguments(trainer: Mapping[str, Any], schedule: Schedule, settings: RouterKD) -> None:
    """Check the arguments of a fit, on whatever machine it will run.

    Raises:
        InputError: as `make_trainer`, or the fit would have no step or no validation.
    """
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch.accelerators import AcceleratorRegistry

    named = trainer.get("accelerator", "auto")
    known = named in ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    here: dict[str, Any] = {"accelerator": "cpu" if known else named, "devices": 1, "num_nodes": 1}
    here |= {"strategy": "auto", "plugins": trainer.get("plugins") or [LightningEnvironment()]}
    with quiet(), _flags_left_alone():
        make_trainer(trainer, fixed_arguments(schedule, settings), **here)
    for name in ("max_steps", "limit_train_batches", "limit_val_batches"):
        if trainer.get(name) == 0:
            raise InputError(f"trainer.{name}=0 leaves a repair no step or no validation")
    begin, end = schedule.round_of(schedule.steps - 1)
    batches = sum(map(schedule.forwards_of, range(begin, end)))  # of the last round, the shortest
    most = {"check_val_every_n_epoch": schedule.rounds, "val_check_interval": batches}
    for name, count in most.items():
        if type(asked := trainer.get(name)) is int and not 1 <= asked <= count:
            raise InputError(f"trainer.{name}={asked} is outside 1 to {count} for this repair")


def check_machine(trainer: Mapping[str, Any], schedule: Schedule, settings: RouterKD) -> None:
    """Check that this machine has what the arguments ask for, and as many processes.

    Raises:
        InputError: it has not.
    """
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    asked = trainer.get("accelerator", "auto")
    if asked in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(
            f"trainer.accelerator={asked!r} needs a GPU and this machine shows none to torch; "
            "use trainer=cpu, or trainer=default, which takes what is there"
        )
    here: dict[str, Any] = {"plugins": trainer.get("plugins") or [LightningEnvironment()]}
    if rank_and_size()[1] > 1:  # who started them has decided
        here |= {"strategy": "auto", "devices": 1, "num_nodes": 1}
    with quiet(), _flags_left_alone():
        made = make_trainer(trainer, fixed_arguments(schedule, settings), **here)
    if (processes := made.num_devices * made.num_nodes) != 1:
        raise InputError(
            f"trainer.devices={trainer.get('devices', 'auto')!r} and trainer.num_nodes="
            f"{made.num_nodes} are for {processes} processes here, and one was started; use "
            "trainer.devices=1, or trainer=ddp with a launcher (torchrun or a Slurm profile)"
        )


@contextlib.contextmanager
def _flags_left_alone() -> Iterator[None]:
    """Put back the flags of torch that making a trainer sets: the fit sets them when it begins."""
    cudnn, variable = torch.backends.cudnn, "CUBLAS_WORKSPACE_CONFIG"
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = cudnn.benchmark, os.environ.get(variable)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        cudnn.benchmark = benchmark
        os.environ.pop(variable, None)
        os.environ.update({} if workspace is None else {variable: workspace})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's advice (more workers, other loggers)."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:  # Lightning sets its own levels when it is imported, so this comes after
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
            warnings.filterwarnings("ignore", ".*srun. command is available.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
