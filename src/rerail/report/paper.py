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
from rerail.run.results import STAGES

FILE = Path(__file__).with_name("paper_tables.json")


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


def beside(cells: Sequence[Cell]) -> list[tuple[Cell, Printed, list[dict[str, Any]], int]]:
    """Return each cell that the paper has, too, and that has scores of tasks.

    Returns:
        The cell, what is printed, one row a benchmark and metric, and how many benchmarks the cell
        lacks. A row has benchmark, task, metric, and stages: the printed share of each stage and
        our score, which is empty where there is none.
    """
    known = [(cell, printed(cell)) for cell in cells if cell.tasks]
    return [(cell, paper, *_rows(cell, paper)) for cell, paper in known if paper]


def _rows(cell: Cell, known: Printed) -> tuple[list[dict[str, Any]], int]:
    rows = []
    for benchmark, values in known.rows.items():
        named = data()["benchmarks"][benchmark]
        task = named["task"]
        metrics = [metric for metric in named["metrics"] if (task, metric) in cell.tasks]
        for metric in metrics or ["absent"]:
            stages = zip(values, cell.tasks.get((task, metric), [{}] * len(STAGES)), strict=True)
            names = {"benchmark": benchmark, "task": task, "metric": metric}
            rows.append({**names, "stages": list(stages)})
    return rows, sum(row["metric"] == "absent" for row in rows)
