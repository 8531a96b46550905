"""Who works on a cell: a process that can be told from a later one with the same number."""

import functools
import os
import platform
from collections.abc import Mapping
from typing import Any

import psutil

_SAME = 5.0  # seconds that a start time may seem to move when the clock is set


@functools.cache
def _start(pid: int) -> float:
    return float(psutil.Process(pid).create_time())


def this_process() -> dict[str, Any]:
    """Return host, pid and start time (seconds since 1970) of this process."""
    return {"host": platform.node(), "pid": os.getpid(), "started": _start(os.getpid())}


def slurm_job() -> str | None:
    """Return the Slurm job that this process runs in, as `12_3` for a task of an array."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def found(process: Mapping[str, Any]) -> psutil.Process | None:
    """Return the process of `this_process` if it runs on this host; None where it does not."""
    if process.get("host") != platform.node():
        return None
    try:
        held = psutil.Process(int(process["pid"]))
        alive = held.is_running() and held.status() != psutil.STATUS_ZOMBIE
        same = abs(held.create_time() - float(process["started"])) < _SAME
    except (psutil.Error, KeyError, TypeError, ValueError):
        return None
    return held if alive and same else None


def is_here(process: Mapping[str, Any]) -> bool:
    """Return whether a process was started on this host, so that `found` can tell."""
    return process.get("host") == platform.node()
