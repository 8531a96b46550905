"""Several processes that run the same cell: their ranks, and how they exchange values.

A launcher (Slurm's srun, torchrun) starts them and describes them in the environment; `join` makes
them a group. One process alone is the usual case: nothing here does anything then. In a group all
processes must call every function that exchanges values, in the same order.
"""

import atexit
import datetime
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from rerail.errors import InputError

T = TypeVar("T")
M = TypeVar("M")

# the others wait while the first process evaluates tasks or exports
_TIMEOUT = datetime.timedelta(days=7)


def in_slurm() -> bool:
    """Return whether Slurm started this process as a task (not in an interactive allocation)."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return {"SLURM_NTASKS", "SLURM_PROCID"} <= os.environ.keys() and not interactive


def launched_rank_and_size() -> tuple[int, int]:
    """Return (rank, size) from the environment: torchrun's variables first, then Slurm's."""
    names = ("RANK", "WORLD_SIZE") if _in_torchrun() else ("SLURM_PROCID", "SLURM_NTASKS")
    if not (_in_torchrun() or in_slurm()):
        return 0, 1
    rank, size = map(_count, names)
    if rank >= size:  # it would wait for the others for ever
        raise InputError(
            f"the environment variables {names[0]}={rank} and {names[1]}={size} contradict each "
            "other; a launcher (srun, torchrun) sets them, so unset what a shell has left there"
        )
    return rank, size


def _in_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def node_rank_and_size() -> tuple[int, int]:
    """Return (rank, size) among the processes of this node."""
    rank, size = launched_rank_and_size()
    names = ("SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    if _in_torchrun():
        names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return _count(names[0], rank), _count(names[1], size)


def _count(name: str, default: int = 0) -> int:
    """Return the number that a launcher put into a variable.

    Raises:
        InputError: it is no whole number.
    """
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise InputError(
            f"the environment variable {name}={text!r} is not a number of processes; "
            "a launcher (srun, torchrun) sets it, so unset what a shell has left there"
        )
    return int(text)


def _group() -> Any | None:
    """Return torch.distributed where there is a group; torch is not imported to find out."""
    module = sys.modules.get("torch.distributed")  # the command line must answer without torch
    initialized = module is not None and module.is_available() and module.is_initialized()
    return module if initialized else None


def group_rank_and_size() -> tuple[int, int]:
    """Return (rank, size) in the group; (0, 1) where there is none."""
    group = _group()
    return (group.get_rank(), group.get_world_size()) if group else (0, 1)


def rank_and_size() -> tuple[int, int]:
    """Return (rank, size) in the group or, where there is none yet, from the environment."""
    return group_rank_and_size() if _group() else launched_rank_and_size()


def is_first() -> bool:
    """Return whether this process is the one that writes files."""
    return rank_and_size()[0] == 0


def join() -> None:
    """Make a group of the processes that were started together; do nothing for one alone.

    Each takes the GPU of its rank on the node. Gloo carries messages, NCCL tensors on GPUs.
    """
    rank, size = launched_rank_and_size()
    if size == 1 or _group():
        return
    import torch
    from torch import distributed

    if in_slurm() and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        # the properties set MASTER_ADDR and MASTER_PORT: the first node, a port from the job's id
        slurm = SLURMEnvironment(auto_requeue=False)
        try:
            _ = slurm.main_address, slurm.main_port
        except (KeyError, ValueError) as error:
            raise InputError(
                f"Slurm's variables name no place where the processes meet ({error}); set "
                "MASTER_ADDR and MASTER_PORT"
            ) from error
    backend = "gloo"
    if torch.cuda.is_available():
        # before the group exists: NCCL binds to the current device
        torch.cuda.set_device(node_rank_and_size()[0] % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, rank=rank, world_size=size, timeout=_TIMEOUT)
    atexit.register(_leave)
    if rank:  # a line of the log appears once, not once a process
        logging.getLogger("rerail").setLevel(logging.WARNING)


def _leave() -> None:
    if (group := _group()) is not None:
        group.destroy_process_group()


def barrier() -> None:
    """Wait until all processes have come here."""
    if (group := _group()) is not None:
        group.barrier()


def gather(value: T) -> list[T]:
    """Return the values of all processes, in the order of their ranks."""
    group = _group()
    if group is None:
        return [value]
    values: list[Any] = [None] * group.get_world_size()
    group.all_gather_object(values, value)
    return values


def gather_on_first(value: T) -> list[T]:
    """Return on the first process what `gather` returns; an empty list on the others."""
    group = _group()
    if group is None:
        return [value]
    rank, size = group_rank_and_size()
    values: list[Any] = [None] * size if rank == 0 else []
    group.gather_object(value, values if rank == 0 else None, dst=0)
    return values


def run_on_first(make: Callable[[], T]) -> T | None:
    """Call `make` on the first process only; return None on the others.

    Where it raises, all processes raise: none is left waiting for the others.
    """
    group = _group()
    if group is None:
        return make()
    value, errors = None, [None]
    if group.get_rank() == 0:
        try:
            value = make()
        except Exception as error:
            # the others wait in the broadcast below: it carries the error to them
            group.broadcast_object_list([_picklable(error)], src=0)
            raise
    group.broadcast_object_list(errors, src=0)
    if errors[0] is not None:
        raise errors[0]
    return value


def _picklable(error: Exception) -> Exception:
    """Return an exception that can be sent: a foreign one may not unpickle elsewhere."""
    if isinstance(error, InputError):
        return error
    return RuntimeError(f"the first process stopped: {type(error).__name__}: {error}")


def broadcast_from_first(make: Callable[[], T]) -> T:
    """Call `make` on the first process only; return its value, or raise its exception, on all."""
    group, value = _group(), run_on_first(make)
    if group is None:
        return cast(T, value)
    values: list[Any] = [value]
    group.broadcast_object_list(values, src=0)
    return cast(T, values[0])


def read_or_make(read: Callable[[], T | None], make: Callable[[], M], write: Callable[[M], T]) -> T:
    """Return an artefact: read back, or else made by all processes and written by the first.

    Args:
        read: returns None where there is nothing sound; called on the first process to decide.
        make: called by all or by none.
        write: called by the first; returns what `read` will.
    """
    artefact = read() if is_first() else None
    # the first decides for all: another may see the file sooner or later than it does
    if not broadcast_from_first(lambda: artefact is not None):
        made = make()
        artefact = run_on_first(lambda: write(made))
        barrier()
    return artefact if artefact is not None else _read_when_visible(read)


def _read_when_visible(read: Callable[[], T | None]) -> T:
    """Return what another process has written; a network file system may show it late."""
    for seconds in (0.0, 0.5, 2.0, 8.0, 30.0):
        time.sleep(seconds)
        if (artefact := read()) is not None:
            return artefact
    raise RuntimeError(
        "a file that the first process wrote does not appear here: is the folder shared?"
    )


def my_share(items: Sequence[T]) -> tuple[int, Sequence[T]]:
    """Return the position of this process's first item, and its items: one run, none twice."""
    rank, size = group_rank_and_size()
    begin, end = rank * len(items) // size, (rank + 1) * len(items) // size
    return begin, items[begin:end]


def reduce_in_rank_order(value: T, merge: Callable[[T, T], T]) -> T:
    """Return the values of all processes merged in the order of their ranks, the same on all.

    The order is fixed because sums of floats depend on it. They arrive one after another, so that
    no process needs memory for more than two.
    """
    group = _group()
    if group is None:
        return value
    rank, size = group_rank_and_size()
    for other in range(1, size):
        if rank == other:
            group.send_object_list([value], dst=0)
        elif rank == 0:
            received: list[Any] = [None]
            group.recv_object_list(received, src=other)
            value = merge(value, received[0])
    merged: list[Any] = [value if rank == 0 else None]
    group.broadcast_object_list(merged, src=0)
    return cast(T, merged[0])
