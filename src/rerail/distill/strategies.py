"""How several processes share a fit: the words of `trainer.strategy`, as Lightning's objects."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from rerail.distill.settings import RouterKD
from rerail.errors import InputError
from rerail.parallel import in_slurm, joined, on_node

STRATEGIES = ("auto", "ddp", "fsdp2")


def check_strategy(trainer: Mapping[str, Any], settings: RouterKD) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
        InputError: the strategy is not known, or needs a cached teacher and has a live one.
    """
    strategy = trainer.get("strategy", "auto")
    if strategy not in STRATEGIES:
        raise InputError(f"trainer.strategy={strategy!r} is not one of {', '.join(STRATEGIES)}")
    if strategy == "fsdp2" and settings.teacher == "live":
        raise InputError(
            "distill.teacher='live' keeps the whole teacher in memory, which "
            "trainer.strategy='fsdp2' is there to avoid; use distill.teacher=cached"
        )


def strategy_of(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trainer's arguments that say how the processes of the group work together.

    Each process was started by a launcher (srun, torchrun); only submitit requeues a Slurm job.
    """
    size = joined()[1]
    if size == 1:
        return {"plugins": [SLURMEnvironment(auto_requeue=False)]} if in_slurm() else {}
    strategy: Any = DDPStrategy()
    if trainer["strategy"] == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    local = on_node()[1]
    environment: Any = SLURMEnvironment(auto_requeue=False) if in_slurm() else None
    return {
        "strategy": strategy,
        "devices": local,
        "num_nodes": size // local,
        "plugins": [environment or TorchElasticEnvironment()],
    }
