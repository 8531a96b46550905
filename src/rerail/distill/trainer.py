"""Arguments of lightning.Trainer: their names, and those that spread a fit over processes.

Lightning takes seconds to import, and most commands never train: functions import it when called.
"""

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rerail.distill.settings import RouterKD, Settings
from rerail.errors import InputError
from rerail.parallel import group_rank_and_size, in_slurm, node_rank_and_size, rank_and_size

STRATEGIES = ("auto", "ddp", "fsdp2")


@functools.cache
def trainer_argument_names() -> tuple[str, ...]:
    """Return the names of the arguments of lightning.Trainer, in its own order.

    They are read from the source file, so that a mistyped one is answered without the import.
    """
    package = importlib.util.find_spec("lightning")  # of a top-level package: nothing is executed
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent / "pytorch" / "trainer" / "trainer.py"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            functions = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            [init] = [function for function in functions if function.name == "__init__"]
            [_self, *named] = [*init.args.args, *init.args.kwonlyargs]
            return tuple(argument.arg for argument in named)
    raise ImportError(f"{source} has no class Trainer; rerail needs lightning 2.6")


def check_strategy(trainer: Mapping[str, Any], settings: Settings) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
        InputError: the strategy is not known, or needs a cached teacher and has a live one.
    """
    strategy = trainer.get("strategy", "auto")
    if strategy not in STRATEGIES:
        raise InputError(f"trainer.strategy={strategy!r} is not one of {', '.join(STRATEGIES)}")
    live = isinstance(settings, RouterKD) and settings.teacher == "live"
    if strategy == "fsdp2" and live:
        raise InputError(
            "distill.teacher='live' keeps the whole teacher in memory, which "
            "trainer.strategy='fsdp2' is there to avoid; use distill.teacher=cached"
        )


def check_processes(trainer: Mapping[str, Any]) -> None:
    """Check that as many processes were started as the trainer's arguments ask for.

    Raises:
        InputError: the numbers differ, or there are several and no strategy shares the work.
    """
    size = rank_and_size()[1]
    strategy = trainer.get("strategy", "auto")
    if (size > 1) == (strategy == "auto"):
        raise InputError(
            f"{size} process{'es' * (size > 1)} started and trainer.strategy={strategy!r} is for "
            f"{'one' if size > 1 else 'several'}; trainer=ddp and trainer=fsdp2 are for several "
            "(torchrun --nproc-per-node=2 -m rerail, or a Slurm profile), the others for one"
        )
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes", 1)
    counted = isinstance(devices, int) and isinstance(nodes, int)
    if size > 1 and counted and devices * nodes != size:
        raise InputError(
            f"trainer.devices={devices} on trainer.num_nodes={nodes} needs {devices * nodes} "
            f"processes and {size} started; leave both out: they follow what was started"
        )


def strategy_arguments(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trainer's arguments that say how the processes of the group work together.

    A launcher (srun, torchrun) has started each process, so Lightning must start none. Only
    submitit requeues a Slurm job, so Lightning's own requeueing is off.
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    size = group_rank_and_size()[1]
    if size == 1:
        return {"plugins": [SLURMEnvironment(auto_requeue=False)]} if in_slurm() else {}
    strategy: Any = DDPStrategy()
    if trainer["strategy"] == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    local_size = node_rank_and_size()[1]
    slurm: Any = SLURMEnvironment(auto_requeue=False) if in_slurm() else None
    return {
        "strategy": strategy,
        "devices": local_size,
        "num_nodes": size // local_size,
        "plugins": [slurm or TorchElasticEnvironment()],
    }
