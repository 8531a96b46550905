"""Markdown tables of result rows, for the pages beside.

`python experiments/tables.py FOLDER [--claim CLAIM]`: all methods, or the grid of one claim.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from rerail.report.cells import Cell, cells_of
from rerail.report.frame import mean_interval
from rerail.report.words import plus_minus, share
from rerail.run.results import read_rows

COLUMNS = (
    "method", "budget", "model", "experts MB", "disk MB", "memory MB", "active M", "tokens/s",
    "NLL compressed", "repaired", "recovery", "seconds plan + repair", "peak MB",
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


def rate(tokens: float | None, seconds: float | None) -> str:
    """Return held-out tokens scored a second, by forwards of whole blocks on the row's host."""
    return "" if not tokens or not seconds else f"{tokens / seconds:.0f}"


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
    words = share(recovery, cell.get("repaired", "recovery_se")) or f"({cell.no_recovery})"
    return [
        *first,
        millions(cell.get(last, "expert_bytes")),
        millions(cell.get(last, "disk_bytes")),
        millions(cell.get(last, "memory_bytes")),
        millions(cell.get(last, "active_parameters")),
        rate(cell.get(last, "tokens"), cell.get(last, "evaluation_seconds")),
        plus_minus(cell.get("compressed", "nll"), cell.get("compressed", "nll_se")),
        plus_minus(cell.get("repaired", "nll"), cell.get("repaired", "nll_se")),
        words,
        " + ".join(f"{s:.0f}" for s in spent if s is not None),
        millions(max(peaks, default=None), 0),
    ]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(fields) + " |" for fields in lines)


def methods(cells: Sequence[Cell]) -> str:
    """Return the table of methods, by paradigm and method; the fine model first."""
    order = sorted(cells, key=lambda c: (c.head["paradigm"], c.head["compressor"], budget(c)))
    parts = []
    for paradigm in dict.fromkeys(c.head["paradigm"] for c in order):
        rows = [line(c) for c in order if c.head["paradigm"] == paradigm]
        parts.append(f"### {paradigm}\n\n{markdown(COLUMNS, rows)}\n")
    return "\n".join(parts)


def harmed(cells: Sequence[Cell]) -> str:
    """Return the cells whose held-out NLL is higher after the repair than before it."""
    rows = []
    for cell in cells:
        before, after = (cell.get(stage, "nll") for stage in ("compressed", "repaired"))
        if before is not None and after is not None and after > before:
            rows.append([*line(cell)[:3], f"{after - before:+.4f}"])
    return markdown(("method", "budget", "model", "NLL change"), rows) if rows else "none"


def unmoved(cells: Sequence[Cell]) -> str:
    """Return how many repairs kept step 0, by model: nothing was changed there."""
    done = [c for c in cells if c.get("repaired", "nll") is not None]
    still = [c for c in done if c.get("repaired", "nll") == c.get("compressed", "nll")]
    models = dict.fromkeys(c.head["model"] for c in done)
    each = ", ".join(f"{sum(c.head['model'] == m for c in still)} {m}" for m in models)
    return f"{len(still)} of {len(done)} repairs changed nothing ({each})"


def fine_against_coarse(cells: Sequence[Cell]) -> str:
    """Return, budget by budget, mean recovery on both models and the methods against the claim."""
    budgets: dict[str, dict[str, dict[str, float]]] = {}
    for cell in cells:
        if (value := cell.get("repaired", "recovery")) is not None:
            of_method = budgets.setdefault(budget(cell), {}).setdefault(cell.head["compressor"], {})
            of_method[cell.head["model"]] = value
    rows = []
    for asked, methods_of in sorted(budgets.items()):
        pairs = {
            m: (v["tiny_fine"], v["tiny_coarse"]) for m, v in methods_of.items() if len(v) == 2
        }
        if not pairs:
            continue
        means = [f"{100 * np.mean(side):.0f} %" for side in zip(*pairs.values(), strict=True)]
        against = [m for m, (fine, coarse) in pairs.items() if fine <= coarse]
        won = f"{len(pairs) - len(against)} of {len(pairs)}"
        rows.append([asked, *means, won, ", ".join(against)])
    return markdown(("budget", "fine", "coarse", "fine above coarse", "not"), rows)


def grid_of(claim: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return a claim's fixed choices and the values of its grid, both by group."""
    path = Path(__file__).with_name(f"{claim}.yaml")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    pairs = [pair for choice in content.get("defaults", []) for pair in choice.items()]
    fixed = {"distill": "router_kd", "calibration": "mix", "evaluation": "heldout"}
    fixed |= {"samples": "n256", "seed": "0"}
    fixed |= {name.removeprefix("override /"): str(value) for name, value in pairs}
    params = content["hydra"]["sweeper"]["params"]
    return fixed, {n: _values(str(v)) for n, v in params.items()}


def _values(words: str) -> list[str]:
    if words.startswith("range("):
        return [str(i) for i in range(int(words[6:-1]))]
    return [word.strip() for word in words.split(",")]


def chosen(cell: Cell) -> dict[str, str]:
    """Return the names of a cell's choices, as a claim's grid has them."""
    head = cell.head
    names = {n: str(v) for n, v in (head["choices"].get("names") or {}).items()}
    return {**names, "samples": f"n{head['samples']}", "seed": str(head["seed"])}


def cells_in(claim: str, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells of a claim's grid, among those of others."""
    fixed, grid = grid_of(claim)
    allowed: Mapping[str, Sequence[str]] = {**{n: [v] for n, v in fixed.items()}, **grid}

    def inside(names: Mapping[str, Any]) -> bool:
        return all(names.get(name) in values for name, values in allowed.items())

    return [cell for cell in cells if inside(chosen(cell))]


def along(axis: str, cells: Sequence[Cell], values: Sequence[str]) -> str:
    """Return recovery and repaired NLL of every method and model, a column each value."""
    rows = []
    for method, model in dict.fromkeys((c.head["compressor"], c.head["model"]) for c in cells):
        cells_at = {
            chosen(c)[axis]: c
            for c in cells
            if (c.head["compressor"], c.head["model"]) == (method, model)
        }
        rows.append(
            [method, model.removeprefix("tiny_"), *(_point(cells_at.get(v)) for v in values)]
        )
    return markdown(("method", "model", *values), rows)


def _point(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if not cell.done:
        return str(cell.head["status"]).replace("_", " ")
    recovery = share(cell.get("repaired", "recovery"), cell.get("repaired", "recovery_se"))
    before, after = (cell.get(stage, "nll") for stage in ("compressed", "repaired"))
    return f"{recovery or 'blank'}; {before:.3f} → {after:.3f}"


def interval(values: Sequence[float]) -> str:
    """Return mean ± half of the 95 % interval over seeds (Student t), with n."""
    if len(values) < 2:
        return ""
    mean, half, n = mean_interval(pd.Series(values))
    return f"{100 * mean:.1f} % ± {100 * half:.1f} (n = {n})"


def over_seeds(cells: Sequence[Cell]) -> str:
    """Return recovery over seeds, and fine minus coarse paired by seed."""
    rows = []
    for method in dict.fromkeys(c.head["compressor"] for c in cells):
        by_model: dict[str, dict[int, float]] = {}
        for cell in (c for c in cells if c.head["compressor"] == method):
            if (value := cell.get("repaired", "recovery")) is not None:
                by_model.setdefault(cell.head["model"], {})[cell.head["seed"]] = value
        fine, coarse = (by_model.get(f"tiny_{grain}", {}) for grain in ("fine", "coarse"))
        both = [fine[s] - coarse[s] for s in fine if s in coarse]
        three = [interval(list(fine.values())), interval(list(coarse.values())), interval(both)]
        rows.append([method, *three])
    return markdown(("method", "fine", "coarse", "fine - coarse, paired"), rows)


def in_domains(cells: Sequence[Cell]) -> str:
    """Return recovery and NLL before and after the repair on each held-out text by itself."""
    texts = list(dict.fromkeys(t for c in cells for t in c.get("repaired", "nll_by") or {}))
    rows = []
    for cell in (c for c in cells if c.done):
        before, after = (cell.get(stage, "nll_by") or {} for stage in ("compressed", "repaired"))
        changes = [_on_text(before[text], after[text]) for text in texts]
        head = cell.head
        first = [head["compressor"], head["model"].removeprefix("tiny_"), head["calibration"]]
        rows.append([*first, *changes])
    return markdown(("method", "model", "repaired on", *texts), rows)


def _on_text(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    recovery = share(after.get("recovery"), after.get("recovery_se")) or "blank"
    return f"{recovery}; {before['nll']:.3f} → {after['nll']:.3f}"


def of_claim(claim: str, cells: Sequence[Cell]) -> str:
    """Return the tables of one claim."""
    inside, grid = cells_in(claim, cells), grid_of(claim)[1]
    parts = [along(n, inside, v) for n, v in grid.items() if n not in ("model", "compressor")]
    parts += [over_seeds(inside)] if "seed" in grid else []
    parts += [in_domains(inside)] if "calibration" in grid else []
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--claim")
    arguments = parser.parse_args()
    cells = cells_of(read_rows(arguments.folder))
    if arguments.claim:
        print(of_claim(arguments.claim, cells))
        return
    for model in dict.fromkeys(c.head["model"] for c in cells):
        first = next((c for c in cells if c.head["model"] == model and c.done), None)
        if first is not None:
            nll = plus_minus(first.get("teacher", "nll"), first.get("teacher", "nll_se"))
            sizes = " / ".join(
                millions(first.get("teacher", n))
                for n in ("expert_bytes", "disk_bytes", "active_parameters")
            )
            print(f"{model}: teacher NLL {nll}, experts MB / disk MB / active M {sizes}\n")
    print(methods(cells))
    print(f"### Fine against coarse\n\n{fine_against_coarse(cells)}\n")
    print(f"### Harmed by the repair\n\n{harmed(cells)}\n\n{unmoved(cells)}")


if __name__ == "__main__":
    main()
