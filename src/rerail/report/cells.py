"""Rows seen as cells, cells as settings: what may be compared, and what may not.

A cell is up to three rows (teacher, compressed, repaired) with one key. A setting is the cells that
differ in nothing but seeds. Numbers of cells are put together only over the same held-out tokens.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from rerail.files import digest
from rerail.report.labels import shown
from rerail.run.results import Row

STAGES = ("teacher", "compressed", "repaired")
_CHOSEN = ("ratio", "samples", "calibration", "allocation", "distill")
_ALONG = {"bits": ("ratio", "bits"), "skip": ("ratio", "skip")}  # choices that vary with a column
MANY = 16  # settings that are readable without being grouped
BLANK = "gap under two standard errors"
UNREPAIRED = "no repair"


class Estimate(NamedTuple):
    """A number with its error.

    Attributes:
        value: the number of one cell, or the mean over n seeds.
        error: the row's own standard error (n = 1), or the standard deviation over n seeds.
        n: number of seeds.
    """

    value: float
    error: float | None
    n: int

    @property
    def half_interval(self) -> float | None:
        """Half the width of the 95 % interval of the value."""
        if self.error is None:
            return None
        if self.n == 1:
            return 1.96 * self.error
        return float(student_t.ppf(0.975, self.n - 1)) * self.error / math.sqrt(self.n)


@dataclass(frozen=True)
class Cell:
    """The rows of one key, in the order of `STAGES`; a cell that is not done has one row."""

    rows: tuple[Row, ...]

    @property
    def head(self) -> Row:
        """The row that shows the choices."""
        return self.rows[0]

    @property
    def done(self) -> bool:
        """Whether every row is done."""
        return all(row["status"] == "done" for row in self.rows)

    @property
    def seconds(self) -> float | None:
        """Wall time of all stages."""
        known = [row["seconds"] for row in self.rows if row["seconds"] is not None]
        return sum(known) if known else None

    def get(self, stage: str, column: str) -> Any:
        """Return a value of a stage, None where the stage or the value is absent."""
        return next((row.get(column) for row in self.rows if row["stage"] == stage), None)

    @property
    def no_recovery(self) -> str:
        """Why the recovery is blank; empty where it is not, or where the cell is not done."""
        if not self.done or self.get("repaired", "recovery") is not None:
            return ""
        return BLANK if self.get("repaired", "nll") is not None else UNREPAIRED


@dataclass(frozen=True)
class Setting:
    """Done cells that differ in their seeds only and were scored on the same tokens."""

    cells: tuple[Cell, ...]

    @property
    def head(self) -> Row:
        """The row that shows the choices."""
        return self.cells[0].head

    def estimate(self, stage: str, column: str) -> Estimate | None:
        """Return a column of a stage over the seeds that have it; None where none has."""
        return _over_seeds(
            [(c.get(stage, column), c.get(stage, f"{column}_se")) for c in self.cells]
        )

    @property
    def texts(self) -> list[str]:
        """The held-out texts."""
        return sorted(self.head["nll_by"] or {})

    def on_text(self, text: str) -> Estimate | None:
        """Return the recovery on one held-out text over the seeds that have it."""
        held = [(c.get("repaired", "nll_by") or {}).get(text) or {} for c in self.cells]
        return _over_seeds([(one.get("recovery"), one.get("recovery_se")) for one in held])

    @property
    def no_recovery(self) -> str:
        """Why no seed has a recovery; empty where one has."""
        reasons = [cell.no_recovery for cell in self.cells]
        return reasons[0] if all(reasons) else ""


def _over_seeds(held: Sequence[tuple[float | None, float | None]]) -> Estimate | None:
    known = [(value, se) for value, se in held if value is not None]
    if len(known) < 2:
        return Estimate(*known[0], 1) if known else None
    values = np.array([value for value, _ in known])
    return Estimate(float(values.mean()), float(values.std(ddof=1)), len(known))


def cells_of(rows: Sequence[Row]) -> list[Cell]:
    """Group rows by key and sort: fine models first, then model, method, ratio, samples, seed.

    A key that was measured twice shows the rows that were written last.
    """
    grouped: dict[Any, dict[str | None, Row]] = {}
    for i, row in enumerate(sorted(rows, key=lambda row: row["time"] or "")):
        cell = grouped.setdefault(row["key"] or i, {})
        if row["stage"] is None or None in cell:
            cell.clear()
        cell[row["stage"]] = row
    cells = [
        Cell(tuple(cell[stage] for stage in (*STAGES, None) if stage in cell))
        for cell in grouped.values()
    ]
    grain = {row["model"]: row["granularity"] for row in rows if row["granularity"]}

    def order(cell: Cell) -> tuple[Any, ...]:
        row = cell.head
        rank = {"fine": 0, "coarse": 1}.get(grain.get(row["model"], ""), 2)
        numbers = [-1 if row[n] is None else row[n] for n in ("ratio", "samples", "seed")]
        return (rank, row["model"] or "", row["compressor"] or "", *numbers, row["key"] or "")

    return sorted(cells, key=order)


def tokens_of(row: Row) -> str:
    """Return what identifies the held-out tokens of a row: only equal ones may be compared."""
    texts = {name: held.get("tokens") for name, held in (row["nll_by"] or {}).items()}
    asked = ((row["choices"] or {}).get("evaluation") or {}).get("texts")
    return digest([row["tokens"], row["heldout"], texts, asked])


def tokens_label(row: Row) -> str:
    """Return the held-out texts of a row in words, as in `docs, speeches (32,640 tokens)`."""
    names = ", ".join(sorted(row["nll_by"] or {})) or "held-out text"
    return f"{names} ({row['tokens'] or 0:,} tokens)"


def choices_without(row: Row, dropped: Iterable[str] = ()) -> str:
    """Return what identifies a row's choices, seeds and some named groups left out."""
    gone = {"command", "names", *dropped}
    choices = dict(row["choices"] or {})
    names = {k: v for k, v in (choices.get("names") or {}).items() if k not in gone}
    kept = {
        name: value if name == "evaluation" else _seedless(value, gone)
        for name, value in choices.items()
        if name not in gone | {"seed"}
    }
    columns = {name: row[name] for name in ("model", "compressor", *_CHOSEN) if name not in gone}
    return digest([kept, names, columns, tokens_of(row)])


def _seedless(value: Any, gone: set[str]) -> Any:
    """Drop seeds at any depth, and `calibration.samples` where samples are left out."""
    if not isinstance(value, Mapping):
        return value
    hidden = {"seed"} | ({"samples"} & gone)
    return {k: _seedless(one, gone) for k, one in value.items() if k not in hidden}


def settings_of(cells: Sequence[Cell]) -> list[Setting]:
    """Return the settings of the done cells that were measured, in the order of the cells."""
    measured = [c for c in cells if c.done and any(row["nll"] is not None for row in c.rows)]
    grouped = grouped_by(measured, lambda cell: choices_without(cell.head))
    return [Setting(tuple(group)) for group in grouped.values()]


def by_tokens(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Return the settings apart by held-out tokens, as tokens -> settings."""
    return grouped_by(settings, lambda setting: tokens_of(setting.head))


def by_model(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Return the settings apart by model."""
    return grouped_by(settings, lambda setting: setting.head["model"] or "?")


def by_paradigm(
    items: Sequence[Any], head: Callable[[Any], Row] = lambda setting: setting.head
) -> dict[str, list[Any]]:
    """Return the items apart by paradigm where they are many, else all of them without a name."""
    if len(items) <= MANY:
        return {"": list(items)} if items else {}
    return grouped_by(items, lambda item: head(item)["paradigm"] or "other")


def series_over(column: str, settings: Sequence[Setting]) -> list[list[Setting]]:
    """Return settings that differ in one column only, sorted by it; at least two in each series."""
    along = _ALONG.get(column, (column,))
    known = [s for s in settings if shown(s.head, column) is not None]
    known = [s for s in known if s.estimate("repaired", "nll")]
    grouped = grouped_by(known, lambda s: choices_without(s.head, along))

    def place(setting: Setting) -> tuple[bool, Any]:
        value = shown(setting.head, column)
        return isinstance(value, str), value

    series = [sorted(group, key=place) for group in grouped.values()]
    return [group for group in series if len({shown(s.head, column) for s in group}) > 1]


def grouped_by(items: Iterable[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    """Return the items by their key, in the order of the items."""
    grouped: dict[str, list[Any]] = {}
    for item in items:
        grouped.setdefault(key(item), []).append(item)
    return grouped
