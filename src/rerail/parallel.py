"""Several processes that run the same cell: who is first, and what they tell each other.

A launcher starts them (Slurm's srun, torchrun) and says so in the environment; `join` makes them a
group. One process alone is the usual case: nothing here does anything then. In a group every
function that talks must be called by all processes, in the same order.
"""

import atexit
import datetime
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from rerail.errors import InputError

T = TypeVar("T")
M = TypeVar("M")

# others wait for as long as the first process evaluates tasks or exports
_PATIENCE = datetime.timedelta(days=7)


def in_slurm() -> bool:
    """Return whether Slurm started this process as a task (not in an interactive allocation)."""
    named = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and "SLURM_PROCID" in os.environ and not named


def started() -> tuple[int, int]:
    """Return (rank, size) as the environment says: torchrun's words first, then Slurm's."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if in_slurm():
        return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    return 0, 1


def on_node() -> tuple[int, int]:
    """Return (rank, size) among the processes of this node."""
    rank, size = started()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        local = os.environ.get("LOCAL_RANK", rank), os.environ.get("LOCAL_WORLD_SIZE", size)
    else:
        local = (
            os.environ.get("SLURM_LOCALID", rank),
            os.environ.get("SLURM_NTASKS_PER_NODE", size),
        )
    return int(local[0]), int(local[1])


def _group() -> Any | None:
    """Return torch.distributed where there is a group; torch is not imported to find out."""
    module = sys.modules.get("torch.distributed")
    joined = module is not None and module.is_available() and module.is_initialized()
    return module if joined else None


def joined() -> tuple[int, int]:
    """Return (rank, size) in the group; (0, 1) where there is none."""
    group = _group()
    return (group.get_rank(), group.get_world_size()) if group else (0, 1)


def world() -> tuple[int, int]:
    """Return (rank, size) in the group, or where there is none yet, as the environment says."""
    return joined() if _group() else started()


def is_first() -> bool:
    """Return whether this process is the one that writes files."""
    return world()[0] == 0


def check_processes(trainer: Mapping[str, Any]) -> None:
    """Check that as many processes were started as the trainer is told to use.

    Raises:
        InputError: they differ, or there are several and no strategy says how they share the work.
    """
    size = world()[1]
    strategy = trainer.get("strategy", "auto")
    if (size > 1) == (strategy == "auto"):
        raise InputError(
            f"{size} process{'es' * (size > 1)} started and trainer.strategy={strategy!r} is for "
            f"{'one' if size > 1 else 'several'}; trainer=ddp and trainer=fsdp2 are for several "
            "(torchrun --nproc-per-node=2 -m rerail, or a Slurm profile), the others for one"
        )
    devices, nodes = trainer.get("devices", "auto"), int(trainer.get("num_nodes", 1))
    if size > 1 and isinstance(devices, int) and devices * nodes != size:
        raise InputError(
            f"trainer.devices={devices} on trainer.num_nodes={nodes} needs {devices * nodes} "
            f"processes and {size} started; leave both out: they follow what was started"
        )


def join() -> None:
    """Make the processes that were started together a group; one alone stays alone.

    Each takes the GPU of its place on the node. Messages travel by gloo, GPU tensors by NCCL.
    """
    rank, size = started()
    if size == 1 or _group():
        return
    import torch
    from torch import distributed

    if in_slurm() and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        # where one is not set, they put the first node's name or a port of the job's own there
        slurm = SLURMEnvironment(auto_requeue=False)
        _ = slurm.main_address, slurm.main_port
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(on_node()[0] % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, rank=rank, world_size=size, timeout=_PATIENCE)
    atexit.register(_leave)
    if rank:
        logging.getLogger("rerail").setLevel(logging.WARNING)


def _leave() -> None:
    if (group := _group()) is not None:
        group.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if (group := _group()) is not None:
        group.barrier()


def gathered(value: T) -> list[T]:
    """Return what every process gives, in the order of their ranks."""
    group = _group()
    if group is None:
        return [value]
    held: list[Any] = [None] * group.get_world_size()
    group.all_gather_object(held, value)
    return held


def gathered_first(value: T) -> list[T]:
    """Return on the first process what `gathered` does; an empty list on the others."""
    group = _group()
    if group is None:
        return [value]
    rank, size = joined()
    held: list[Any] = [None] * size if rank == 0 else []
    group.gather_object(value, held if rank == 0 else None, dst=0)
    return held


def alone(make: Callable[[], T]) -> T | None:
    """Return what the first process makes, and None on the others; its exception is everyone's."""
    group = _group()
    if group is None:
        return make()
    value, errors = None, [None]
    if group.get_rank() == 0:
        try:
            value = make()
        except Exception as error:
            group.broadcast_object_list([_plain(error)], src=0)
            raise
    group.broadcast_object_list(errors, src=0)
    if errors[0] is not None:
        raise errors[0]
    return value


def _plain(error: Exception) -> Exception:
    """Return an exception that can be sent."""
    if isinstance(error, InputError):
        return error
    return RuntimeError(f"the first process stopped: {type(error).__name__}: {error}")


def first(make: Callable[[], T]) -> T:
    """Return on every process what the first one makes; its exception is everyone's."""
    group, value = _group(), alone(make)
    if group is None:
        return cast(T, value)
    held: list[Any] = [value]
    group.broadcast_object_list(held, src=0)
    return cast(T, held[0])


def kept(read: Callable[[], T | None], make: Callable[[], M], write: Callable[[M], T]) -> T:
    """Return what is read back, or else made by all processes and written by the first.

    Args:
        read: returns None where there is nothing sound; called on the first process to decide.
        make: called by all or by none.
        write: called by the first; returns what `read` will.
    """
    held = read() if is_first() else None
    if not first(lambda: held is not None):
        made = make()
        held = alone(lambda: write(made))
        barrier()
    return held if held is not None else _seen(read)


def _seen(read: Callable[[], T | None]) -> T:
    """Return what another process has written; a network file system may show it late."""
    for wait in (0.0, 0.5, 2.0, 8.0, 30.0):
        time.sleep(wait)
        if (held := read()) is not None:
            return held
    raise RuntimeError("what the first process wrote is not to be seen here: is the folder shared?")


def part(items: Sequence[T]) -> tuple[int, Sequence[T]]:
    """Return this process's run of the items, and the place of its first one."""
    rank, size = joined()
    begin, end = rank * len(items) // size, (rank + 1) * len(items) // size
    return begin, items[begin:end]


def folded(value: T, merge: Callable[[T, T], T]) -> T:
    """Return all processes' values merged in the order of their ranks, the same on all.

    One after another, so that no process holds more than two of them.
    """
    group = _group()
    if group is None:
        return value
    rank, size = joined()
    for other in range(1, size):
        if rank == other:
            group.send_object_list([value], dst=0)
        elif rank == 0:
            held: list[Any] = [None]
            group.recv_object_list(held, src=other)
            value = merge(value, held[0])
    out: list[Any] = [value if rank == 0 else None]
    group.broadcast_object_list(out, src=0)
    folded_value: T = out[0]
    return folded_value
