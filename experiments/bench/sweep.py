"""A sweep of 24 cells through the local Slurm, against the same 24 cells run one by one.

`make bench-sweep`, on two cores of an otherwise idle machine, since this one is about the clock.
Needs what `make slurm-up` needs, and taskset.

The sweep has one worker and the first core, the cells alone have the second one, at the same time,
so that whatever else the machine does falls on both; one core means one thread. A single run that
may take all cores is measured after that, on some cells. Every cache begins empty.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from timing import Row, row

from rerail.report.cells import Cell, cells_of
from rerail.run.results import read_rows

LOCAL = Path(__file__).parents[2] / "slurm" / "local"
GRID = {
    "model": ("tiny_fine", "tiny_coarse"),
    "compressor": ("reap", "naee", "hc_smoe", "m_smoe", "mobe", "svd"),
    "ratio": ("half", "quarter"),
}
LIMIT = 0.85
Choice = tuple[str, ...]
PARTS = ("teacher scored", "planned", "compressed scored", "repaired", "repaired scored", "rest")


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of a person who has set nothing, with a new cache of their own."""
    left = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**left, "RERAIL_CACHE": str(cache)}


def pinned(core: str, *command: str | Path) -> list[str]:
    """Return the command that may use this core, or all of them where none is named."""
    prefix = ["taskset", "--cpu-list", core] if core else []
    return [*prefix, sys.executable, *map(str, command)]


def seconds(words: Sequence[str], env: Mapping[str, str], core: str = "") -> float:
    """Return how long a command of rerail takes on the clock, on one core or on all.

    Raises:
        RuntimeError: it failed.
    """
    began = time.monotonic()
    command = pinned(core, "-m", "rerail", *words)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"rerail {' '.join(words)}: {done.stdout}{done.stderr}")
    return time.monotonic() - began


@dataclass(frozen=True)
class Bench:
    """The cells, each way to run them in a folder of its own.

    Attributes:
        root: an empty folder.
        samples: preset of the calibration size.
        grid: group -> presets.
    """

    root: Path
    samples: str
    grid: Mapping[str, Sequence[str]]

    def run_sweep(self, name: str, workers: int, core: str = "") -> float:
        """Return the seconds of a sweep with so many workers of one thread."""
        choices = [f"{group}={','.join(values)}" for group, values in self.grid.items()]
        words = ["-m", "+slurm=local", f"hydra.launcher.array_parallelism={workers}", *choices]
        return self._seconds(words, name, "out", "cache", core)

    def run_alone(self, name: str, methods: Sequence[str], core: str = "") -> dict[Choice, float]:
        """Return the seconds of each cell of these methods, with a cache and report of its own."""
        times = {}
        for number, values in enumerate(itertools.product(*self.grid.values())):
            if values[list(self.grid).index("compressor")] in methods:
                words = [f"{group}={v}" for group, v in zip(self.grid, values, strict=True)]
                apart = f"out/{number}", f"cache{number}"
                times[values] = self._seconds(words, name, *apart, core)
        return times

    def _seconds(self, words: Sequence[str], name: str, out: str, cache: str, core: str) -> float:
        folder = self.root / name
        words = [*words, f"samples={self.samples}", f"out={folder / out}"]
        return seconds(words, environment(folder / cache), core)

    def cells(self, name: str) -> list[Cell]:
        """Return what came out."""
        return cells_of(read_rows(self.root / name / "out"))


def seconds_by_part(cells: Sequence[Cell], total: float, shared: bool) -> dict[str, float]:
    """Return where the seconds went; a teacher's scoring counts once a model where it is shared."""
    scored = [(c.head["model"], c.get("teacher", "evaluation_seconds")) for c in cells]
    parts = [
        sum(dict(scored).values()) if shared else sum(spent for _, spent in scored),
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
    subprocess.run(pinned(core, LOCAL / "up"), check=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run([sys.executable, LOCAL / "down"], check=True)


def sweep_rows(bench: Bench, threaded: int) -> list[Row]:
    """Measure one worker beside the cells alone, then two workers, then some cells on all cores.

    Args:
        bench: the cells.
        threaded: how many methods are also run alone on all cores.
    """
    methods, slurm = bench.grid["compressor"], bench.root / "slurm"
    with cluster(slurm, "0"), ThreadPoolExecutor() as beside:
        single = beside.submit(bench.run_alone, "alone", methods, "1")
        one = bench.run_sweep("one", 1, "0")
        each = single.result()
    with cluster(slurm):
        two = bench.run_sweep("two", 2)
    threads = bench.run_alone("threads", methods[:threaded])
    alone, same = sum(each.values()), sum(each[values] for values in threads)
    cells = {name: bench.cells(name) for name in ("one", "alone", "two")}
    apart = {
        "sweep to alone": difference(cells["one"], cells["alone"]),
        "two workers to one": difference(cells["two"], cells["one"]),
    }
    return [
        row("sweep: cells", len(each), None, "count"),
        row(f"sweep: one worker / the cells alone ({bench.samples})", one / alone, LIMIT),
        row("sweep: one worker / two workers", one / two),
        row("sweep: cells alone, all cores / one core", sum(threads.values()) / same),
        *(row(f"sweep: largest difference of an NLL, {n}", v) for n, v in apart.items()),
        *clock_rows("one worker", one, seconds_by_part(cells["one"], one, shared=True)),
        *clock_rows("cells alone", alone, seconds_by_part(cells["alone"], alone, shared=False)),
        *clock_rows("two workers", two, seconds_by_part(cells["two"], 2 * two, shared=True)),
    ]


def clock_rows(name: str, total: float, parts: Mapping[str, float]) -> list[Row]:
    """Return the seconds on the clock, and of the workers together what they spent them on."""
    seconds = {"on the clock": total, **parts}
    return [row(f"{name}: {part}", value, None, "s") for part, value in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", default="n256")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = sweep_rows(Bench(Path(name), arguments.samples, GRID), 1)
    for r in rows:
        limit = "" if r["limit"] is None else f"at most {r['limit']:g}"
        print(f"{r['name']:<70} {r['value']:>10.4g} {r['unit']:<6} {limit}")
    arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
