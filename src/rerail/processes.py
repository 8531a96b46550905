"""Processes on record: one is distinguished from a later process with the same number."""

import functools
import os
import platform
from collections.abc import Mapping
from typing import Any

import psutil

_CLOCK_SHIFT = 5.0  # seconds that a start time may seem to move when the clock is set


@functools.cache  # asked with every status file that is written
def _start_time(pid: int) -> float:
    return float(psutil.Process(pid).create_time())


def this_process() -> dict[str, Any]:
    """Return host, pid and start time (seconds since 1970) of this process."""
    return {"host": platform.node(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def slurm_job() -> str | None:
    """Return the Slurm job that this process runs in, as `12_3` for a task of an array."""
    array, number = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    if array and number:
        return f"{array}_{number}"
    return os.environ.get("SLURM_JOB_ID")


def running_process(record: Mapping[str, Any]) -> psutil.Process | None:
    """Return the process that `this_process` recorded if it runs on this host, else None."""
    if not is_on_this_host(record):
        return None
    try:
        process = psutil.Process(int(record["pid"]))
        # a zombie has ended; only its parent has not asked how
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        same = abs(process.create_time() - float(record["started"])) < _CLOCK_SHIFT
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return None
    return process if alive and same else None


def is_on_this_host(record: Mapping[str, Any]) -> bool:
    """Return whether a recorded process was started on this host, where it can be looked up."""
    return record.get("host") == platform.node()
