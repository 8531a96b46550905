"""Ratios of times that survive a busy machine."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Row = dict[str, Any]


def row(name: str, value: float, limit: float | None = None, unit: str = "ratio") -> Row:
    """Return one line of bench.json."""
    return {"name": name, "value": value, "limit": limit, "unit": unit}


def interleaved(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each piece of work in each round, after one round to warm up.

    The pieces take turns in an order drawn anew for every round, so that whatever else the machine
    does, and what a piece leaves behind in caches and heap, falls on all alike. CPU time leaves out
    the time in which others held the core; on one thread of an idle machine it is the time on the
    clock.
    """
    names = list(work)
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds + 1):
        for name in random.Random(r).sample(names, len(names)):
            began = time.process_time()
            work[name]()
            if r:
                times[name].append(time.process_time() - began)
    return times


def ratio(times: Mapping[str, list[float]], above: str, **below: float) -> float:
    """Return the median over rounds of time(above) / sum of factor x time(name)."""
    floors = [sum(f * times[n][r] for n, f in below.items()) for r in range(len(times[above]))]
    return statistics.median(t / f for t, f in zip(times[above], floors, strict=True))
