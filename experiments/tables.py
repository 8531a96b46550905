"""Markdown tables of result rows, for the pages beside: `python experiments/tables.py FOLDER`."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from rerail.track.cells import Cell, cells_of, plus_minus, share
from rerail.track.results import read_rows

COLUMNS = (
    "method", "budget", "model", "experts MB", "disk MB", "active M", "NLL compressed", "repaired",
    "recovery", "seconds plan + repair", "peak MB",
)  # fmt: skip


def budget(cell: Cell) -> str:
    """Return what the cell was asked for, in its paradigm's terms."""
    head = cell.head
    if head["bits"] is not None:
        return f"{head['bits']:g} bits"
    if head["paradigm"] == "skipping":
        return "rule" if head["ratio"] is None else f"skip {head['ratio']:g}"
    return f"{head['ratio']:g}"


def millions(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value / 1e6:.{digits}f}"


def line(cell: Cell) -> list[str]:
    """Return one row of the table of methods."""
    head = cell.head
    first = [head["compressor"], budget(cell), head["model"].removeprefix("tiny_")]
    if not cell.done:
        return [*first, f"{head['status'].replace('_', ' ')}: {head['reason']}"]
    last = "repaired" if cell.get("repaired", "nll") is not None else "compressed"
    spent = [cell.get(stage, "seconds") for stage in ("compressed", "repaired")]
    peaks = [row["peak_memory"] for row in cell.rows if row["peak_memory"]]
    recovery = cell.get("repaired", "recovery")
    said = share(recovery, cell.get("repaired", "recovery_se")) or f"({cell.no_recovery})"
    return [
        *first,
        millions(cell.get(last, "expert_bytes")),
        millions(cell.get(last, "disk_bytes")),
        millions(cell.get(last, "active_parameters")),
        plus_minus(cell.get("compressed", "nll"), cell.get("compressed", "nll_se")),
        plus_minus(cell.get("repaired", "nll"), cell.get("repaired", "nll_se")),
        said,
        " + ".join(f"{s:.0f}" for s in spent if s is not None),
        millions(max(peaks, default=None), 0),
    ]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(one) + " |" for one in lines)


def methods(cells: Sequence[Cell]) -> str:
    """Return the table of methods, by paradigm and method; the fine model first."""
    order = sorted(cells, key=lambda c: (c.head["paradigm"], c.head["compressor"], budget(c)))
    parts = []
    for paradigm in dict.fromkeys(c.head["paradigm"] for c in order):
        held = [line(c) for c in order if c.head["paradigm"] == paradigm]
        parts.append(f"### {paradigm}\n\n{markdown(COLUMNS, held)}\n")
    return "\n".join(parts)


def harmed(cells: Sequence[Cell]) -> str:
    """Return the cells whose held-out NLL is higher after the repair than before it."""
    rows = []
    for cell in cells:
        before, after = (cell.get(stage, "nll") for stage in ("compressed", "repaired"))
        if before is not None and after is not None and after > before:
            rows.append([*line(cell)[:3], f"{after - before:+.4f}"])
    return markdown(("method", "budget", "model", "NLL change"), rows) if rows else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    cells = cells_of(read_rows(parser.parse_args().folder))
    for model in dict.fromkeys(c.head["model"] for c in cells):
        one = next((c for c in cells if c.head["model"] == model and c.done), None)
        if one is not None:
            nll = plus_minus(one.get("teacher", "nll"), one.get("teacher", "nll_se"))
            sizes = " / ".join(
                millions(one.get("teacher", n))
                for n in ("expert_bytes", "disk_bytes", "active_parameters")
            )
            print(f"{model}: teacher NLL {nll}, experts MB / disk MB / active M {sizes}\n")
    print(methods(cells))
    print(f"### Harmed by the repair\n\n{harmed(cells)}")


if __name__ == "__main__":
    main()
