"""What making a part costs: seconds, and the peak of this process's memory."""

import contextlib
import ctypes
import functools
import gc
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rerail.store import Artefact


@dataclass(frozen=True)
class Cost:
    """Wall time in seconds, and peak memory of the process in bytes."""

    seconds: float
    peak_memory: int


@functools.cache
def freeze_imports() -> None:
    """Exempt from garbage collection, once a process, all that is alive: imported code above all.

    Every `start_peak` collects, and would otherwise look at some millions of such objects.
    """
    gc.collect()  # what is garbage now would never go
    gc.freeze()


def with_cost(make: Callable[[], Artefact | None]) -> Callable[[], Artefact | None]:
    """Return `make` with `seconds` and `peak_memory` (bytes) added to the data that it returns."""

    @functools.wraps(make)
    def measured() -> Artefact | None:
        start_peak()
        start = time.perf_counter()
        made = make()
        cost = Cost(time.perf_counter() - start, peak_memory())
        return None if made is None else made._replace(data={**made.data, **asdict(cost)})

    return measured


def start_peak() -> None:
    """Start a new peak of this process's memory, where the kernel can (Linux).

    What earlier work freed goes back to the system first, so that it is not counted again.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Return the peak resident memory since `start_peak` (elsewhere: of the process), in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
