"""The printed numbers of Router KD's paper beside ours, benchmark by benchmark.

The data file holds tables 2 to 6 of arXiv 2603.02217v1 as printed, and which task and metrics of
lm-eval stand for each benchmark; the paper names neither.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rerail.report.cells import Cell
from rerail.report.page import Field, Section, Table, Words
from rerail.run.results import STAGES

FILE = Path(__file__).with_name("paper_tables.json")

Score = Mapping[str, Any]  # of lm-eval, as in the rows: {task, metric, value, se, n}


class Printed(NamedTuple):
    """What the paper prints of a model, method and ratio.

    Attributes:
        number: of the table.
        method: its name there.
        rows: benchmark -> shares of 1 of the original, the compressed and the repaired model.
    """

    number: str
    method: str
    rows: Mapping[str, Sequence[float]]


@functools.cache
def data() -> dict[str, Any]:
    """Return the data file."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def printed(cell: Cell) -> Printed | None:
    """Return what the paper prints of the cell's model, method and ratio; None where it does not.

    The model is known by the last part of its path, so that a downloaded copy counts, too.
    """
    head = cell.head
    path = ((head["choices"] or {}).get("model") or {}).get("path_or_id") or ""
    model = Path(str(path)).name
    method = data()["methods"].get(head["compressor"])
    for number, table in data()["tables"].items():
        same = table["model"] == model and math.isclose(
            table["ratio"], head["ratio"] or 0, abs_tol=1e-4
        )
        if same and method in table["columns"]:
            places = [table["columns"].index(name) for name in ("Original", method, f"{method}-R")]
            rows = {name: [values[i] for i in places] for name, values in table["rows"].items()}
            return Printed(number, method, rows)
    return None


def beside(cells: Sequence[Cell]) -> Section:
    """Return a table for each cell that the paper has, too, and that has scores of tasks."""
    parts = [
        _table(cell, known)
        for cell in cells
        if (known := printed(cell)) and any(cell.get(stage, "tasks") for stage in STAGES)
    ]
    lead = f"{data()['source']}. {data()['note']} Ours with their standard errors; the difference "
    lead += "is ours minus the paper's, in points. Both in percent."
    return Section("paper", "Beside the paper", [Words("p", lead), *parts] if parts else [])


def _table(cell: Cell, known: Printed) -> Table:
    ours = [{(t["task"], t["metric"]): t for t in cell.get(s, "tasks") or []} for s in STAGES]
    rows: list[list[Field | str]] = []
    absent = 0
    for benchmark, values in known.rows.items():
        named = data()["benchmarks"][benchmark]
        keys = [(named["task"], metric) for metric in named["metrics"]]
        scored = [key for key in keys if any(key in scores for scores in ours)]
        absent += not scored
        for task, metric in scored or [(named["task"], "absent")]:
            scores = [stage.get((task, metric)) for stage in ours]
            rows.append([Field(benchmark, f"{task}, {metric}"), *_fields(values, scores)])
    heads = [f"{stage} {what}" for stage in STAGES for what in ("paper", "ours", "difference")]
    caption = f"{cell.name(['ratio'])}, seed {cell.head['seed']}: table {known.number} of the "
    caption += f"paper ({known.method}) and ours; "
    caption += f"{absent} of {len(known.rows)} benchmarks are absent here."
    return Table(caption, ["benchmark", *heads], rows, "sortable overview")


def _fields(values: Sequence[float], scores: Sequence[Score | None]) -> list[Field | str]:
    fields: list[Field | str] = []
    for value, score in zip(values, scores, strict=True):
        fields.append(Field(f"{100 * value:.2f}", sort=value))
        if score is None or score["value"] is None:
            fields += ["absent", ""]
            continue
        ours, se, gap = score["value"], score["se"], score["value"] - value
        error = "" if se is None else f" ± {100 * se:.2f}"
        fields.append(Field(f"{100 * ours:.2f}{error}", f"n = {score['n']}", ours))
        fields.append(Field(f"{100 * gap:+.2f}", sort=gap))
    return fields
