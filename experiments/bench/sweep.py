"""A sweep of 24 cells through the local Slurm, against the same 24 cells run one by one.

`python experiments/bench/sweep.py --out sweep.json`, on two cores of an otherwise idle machine,
since this one is about the clock. Needs what `make slurm-up` needs.

The sweep has one worker and the first core, the cells alone have the second one, at the same time,
so that whatever else the machine does falls on both; one core means one thread. A single run that
may take all cores is measured after that, on some cells. Every cache begins with the corpora and
nothing else, so that reading the installed documentation is no one's saving.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from timing import Row, row

from rerail.track.cells import Cell, cells_of
from rerail.track.results import read_rows

LOCAL = Path(__file__).parents[2] / "slurm" / "local"
GRID = {
    "model": ("tiny_fine", "tiny_coarse"),
    "compressor": ("reap", "naee", "hc_smoe", "m_smoe", "mobe", "svd"),
    "ratio": ("half", "quarter"),
}
LIMIT = 0.85
PARTS = ("teacher scored", "planned", "compressed scored", "repaired", "repaired scored", "rest")


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of a person who has set nothing, with a cache of their own."""
    corpora = cache.parent.parent / "corpora"
    if not corpora.exists():
        program = "from rerail.data.text import Docs; Docs().documents('heldout')"
        held = {**os.environ, "RERAIL_CACHE": str(corpora)}
        subprocess.run([sys.executable, "-c", program], env=held, check=True, capture_output=True)
    shutil.copytree(corpora, cache)
    left = {n: v for n, v in os.environ.items() if n not in ("OMP_NUM_THREADS", "RERAIL_CACHE")}
    return {**left, "RERAIL_CACHE": str(cache)}


def on(core: str, *command: str | Path) -> list[str]:
    """Return the command that may use this core, or all of them where none is named."""
    pinned = ["taskset", "--cpu-list", core] if core else []
    return [*pinned, sys.executable, *map(str, command)]


def seconds(words: Sequence[str], env: Mapping[str, str], core: str = "") -> float:
    """Return how long a command of rerail takes on the clock, on one core or on all.

    Raises:
        RuntimeError: it failed.
    """
    began = time.monotonic()
    command = on(core, "-m", "rerail", *words)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"rerail {' '.join(words)}: {done.stdout}{done.stderr}")
    return time.monotonic() - began


def swept(
    folder: Path, workers: int, samples: str, grid: Mapping[str, Sequence[str]], core: str = ""
) -> float:
    """Sweep the grid with so many workers of one thread, from an empty cache."""
    asked = [f"{name}={','.join(values)}" for name, values in grid.items()]
    words = ["-m", "+slurm=local", f"hydra.launcher.array_parallelism={workers}", *asked]
    words += [f"samples={samples}", f"out={folder / 'out'}"]
    return seconds(words, environment(folder / "cache"), core)


def alone(
    folder: Path, samples: str, grid: Mapping[str, Sequence[str]], core: str = ""
) -> list[float]:
    """Run each cell of the grid by itself, each with an empty cache and a report of its own."""
    found = []
    for number, values in enumerate(itertools.product(*grid.values())):
        words = [f"{name}={value}" for name, value in zip(grid, values, strict=True)]
        words += [f"samples={samples}", f"out={folder / 'out' / str(number)}"]
        found.append(seconds(words, environment(folder / f"cache{number}"), core))
    return found


def spent(cells: Sequence[Cell], total: float, shared: bool) -> dict[str, float]:
    """Return where the seconds went; a teacher's scoring counts once a model where it is shared."""
    scored = [(c.head["model"], c.get("teacher", "evaluation_seconds")) for c in cells]
    parts = [
        sum(dict(scored).values()) if shared else sum(one for _, one in scored),
        *(
            sum(cell.get(stage, column) for cell in cells)
            for stage in ("compressed", "repaired")
            for column in ("seconds", "evaluation_seconds")
        ),
    ]
    return dict(zip(PARTS, [*parts, total - sum(parts)], strict=True))


def difference(one: Sequence[Cell], other: Sequence[Cell]) -> float:
    """Return the largest difference between the NLLs of the same cells."""
    nlls = [{c.head["key"]: c.get("repaired", "nll") for c in cells} for cells in (one, other)]
    return max(abs(nlls[0][key] - nlls[1][key]) for key in nlls[0].keys() | nlls[1].keys())


@contextmanager
def cluster(home: Path, core: str = "") -> Iterator[None]:
    """Run a Slurm of its own for the time of the block; its jobs may use what it may."""
    os.environ["RERAIL_SLURM"] = str(home)
    subprocess.run(on(core, LOCAL / "up"), check=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run([sys.executable, LOCAL / "down"], check=True)


def sweep_rows(
    folder: Path, samples: str, grid: Mapping[str, Sequence[str]], threaded: int
) -> list[Row]:
    """Measure one worker beside the cells alone, then two workers, then some cells on all cores.

    Args:
        folder: an empty one, for results and caches.
        samples: preset of the calibration size.
        grid: group -> presets.
        threaded: how many methods are also run alone on all cores.
    """
    environment(folder / "first" / "cache")
    with cluster(folder / "slurm", "0"), ThreadPoolExecutor() as beside:
        single = beside.submit(alone, folder / "alone", samples, grid, "1")
        one = swept(folder / "one", 1, samples, grid, "0")
        each = single.result()
    with cluster(folder / "slurm"):
        two = swept(folder / "two", 2, samples, grid)
    some = {**grid, "compressor": grid["compressor"][:threaded]}
    threads = sum(alone(folder / "threads", samples, some))
    order = list(itertools.product(*grid.values()))
    same = sum(t for t, values in zip(each, order, strict=True) if values[1] in some["compressor"])
    held = {name: cells_of(read_rows(folder / name / "out")) for name in ("one", "alone", "two")}
    rows = [
        row("sweep: cells", len(order), None, "count"),
        row(f"sweep: one worker / the cells alone ({samples})", one / sum(each), LIMIT),
        row("sweep: one worker / two workers", one / two),
        row("sweep: cells alone, all cores / one core", threads / same),
        row(
            "sweep: largest difference of an NLL, sweep to alone",
            difference(held["one"], held["alone"]),
        ),
        row(
            "sweep: largest difference of an NLL, two workers to one",
            difference(held["two"], held["one"]),
        ),
    ]
    for name, total in (("one", one), ("alone", sum(each)), ("two", two)):
        said = {"one": "one worker", "alone": "cells alone", "two": "two workers"}[name]
        rows.append(row(f"{said}: on the clock", total, None, "s"))
        worked = 2 * total if name == "two" else total
        parts = spent(held[name], worked, shared=name != "alone")
        rows += [row(f"{said}: {part}", value, None, "s") for part, value in parts.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", default="n256")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = sweep_rows(Path(name), given.samples, GRID, 1)
    for r in rows:
        limit = "" if r["limit"] is None else f"at most {r['limit']:g}"
        print(f"{r['name']:<70} {r['value']:>10.4g} {r['unit']:<6} {limit}")
    given.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
