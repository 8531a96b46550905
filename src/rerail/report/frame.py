"""The tidy frame: one row a cell, stage, text and measure; and what it says over seeds.

A setting is the cells that differ in nothing but seeds. Its estimate is the number of one cell with
that row's own standard error, or the mean over n seeds with their standard deviation.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from rerail.report.cells import Cell, cells_of, grouped
from rerail.run.settings import BUDGETS, VARYING, setting_of, shown

MEASURES = ("nll", "kl", "esap", "recovery", "bytes", "active_experts")
BY = ["setting", "stage", "text", "measure"]
MANY = 16  # settings that are readable without being grouped
_ALONG = {"bits": ("ratio", "bits"), "skip": ("ratio", "skip")}  # choices that vary with a column


def heads(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return what names each cell: model, method, its budget as it is shown, other choices."""
    plain = ("model", "granularity", "compressor", "paradigm", "seed")
    records = [
        {n: cell.head[n] for n in plain} | {n: shown(cell.head, n) for n in VARYING}
        for cell in cells
    ]
    return pd.DataFrame(records, columns=[*plain, *VARYING], dtype=object)


def varying(settings: pd.DataFrame) -> list[str]:
    """Return the choices that hold more than one value.

    Where there are several budgets, of whatever kind, every kind that is there.
    """
    counts = {name: settings[name].dropna().nunique() for name in VARYING}
    several = sum(counts[name] for name in BUDGETS) > 1
    return [n for n in VARYING if counts[n] > 1 or (several and n in BUDGETS and counts[n])]


def columns_of(cells: Sequence[Cell]) -> list[str]:
    """Return the columns by which a table names cells: their budget, and what varies.

    The budget is `ratio`, or `budget` where there is another kind.
    """
    frame = heads(cells)
    kinds = {name for name in BUDGETS if frame[name].notna().any()}
    others = [name for name in varying(frame) if name not in BUDGETS]
    seeds = ["seed"] if frame["seed"].nunique(dropna=False) > 1 else []
    return ["ratio" if kinds <= {"ratio"} else "budget", *others, *seeds]


@dataclass(frozen=True)
class Results:
    """The cells of a page or a table, and all that is computed from them.

    Attributes:
        cells: in the order in which they are shown.
    """

    cells: Sequence[Cell]

    @classmethod
    def of(cls, rows: Sequence[Any]) -> "Results":
        """Return the results in these rows."""
        return cls(cells_of(rows))

    @property
    def done(self) -> list[Cell]:
        """The cells that are done."""
        return [cell for cell in self.cells if cell.done]

    @cached_property
    def _measured(self) -> dict[str, list[Cell]]:
        """The done cells that were scored, by their setting."""
        scored = [c for c in self.done if any(row["nll"] is not None for row in c.rows)]
        return grouped(scored, [setting_of(cell.head) for cell in scored])

    @cached_property
    def settings(self) -> pd.DataFrame:
        """One row a setting: what names it, its held-out tokens and its cells.

        `twin` is equal for settings that differ in the model only; `blank` says why no seed has a
        recovery.
        """
        groups = self._measured.values()
        first = [cells[0] for cells in groups]
        twins = [setting_of(cell.head, ["model"]) for cell in first]
        blanks = [[cell.no_recovery for cell in cells] for cells in groups]
        return (
            heads(first)
            .assign(
                setting=pd.Series(list(self._measured), dtype=object),
                head=pd.Series([cell.head for cell in first], dtype=object),
                cells=pd.Series(list(groups), dtype=object),
                tokens=[cell.tokens for cell in first],
                twin=pd.factorize(pd.Series(twins, dtype=object))[0],
                blank=[reasons[0] if all(reasons) else "" for reasons in blanks],
            )
            .set_index("setting")
        )

    @cached_property
    def tidy(self) -> pd.DataFrame:
        """value and se of every measure, by setting, seed, stage and text ("" for all of them)."""
        records = []
        for setting, cells in self._measured.items():
            for row in (row for cell in cells for row in cell.rows):
                place = (setting, row["seed"], row["stage"])
                records += [(*place, "", n, row[n], row.get(f"{n}_se")) for n in MEASURES]
                records += [
                    (*place, text, "recovery", score.get("recovery"), score.get("recovery_se"))
                    for text, score in (row["nll_by"] or {}).items()
                ]
        columns = ["setting", "seed", "stage", "text", "measure", "value", "se"]
        frame = pd.DataFrame(records, columns=columns).dropna(subset="value")
        return frame.astype({"value": float, "se": float})

    @cached_property
    def estimates(self) -> pd.DataFrame:
        """value, error, n and half (of the 95 % interval), by setting, stage, text and measure."""
        groups = self.tidy.groupby(BY)
        estimates = groups["value"].agg(value="mean", spread="std", n="size")
        n, spread, several = estimates["n"], estimates["spread"], estimates["n"] > 1
        # "first" skips what is missing, and with one seed it is the error of that row
        error = spread.where(several, groups["se"].first())
        half = half_interval(spread, n).where(several, 1.96 * error)
        return estimates[["value"]].assign(error=error, n=n, half=half)

    def estimate(
        self, settings: pd.DataFrame, measure: str, stage: str = "repaired", text: str = ""
    ) -> pd.DataFrame:
        """Return value, error, n and half of a measure for these settings; NaN without a value."""
        places = [(setting, stage, text, measure) for setting in settings.index]
        estimates = self.estimates.reindex(pd.MultiIndex.from_tuples(places, names=BY))
        return estimates.set_axis(settings.index).fillna({"n": 0}).astype({"n": int})

    def pairs(self, settings: pd.DataFrame) -> pd.DataFrame:
        """Return `fine` and `coarse`: settings that differ in the model only, on equal tokens."""
        sides = [
            settings[settings["granularity"] == grain]["twin"].rename_axis(grain).reset_index()
            for grain in ("fine", "coarse")
        ]
        pairs = sides[0].merge(sides[1], on="twin").sort_values("twin", kind="stable")
        return pairs.reset_index(drop=True)[["fine", "coarse"]]

    def differences(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """Return value, n and half of recovery, fine minus coarse, for the pairs that share a seed.

        Paired by seed with Student's t. With one seed the interval is made of the two standard
        errors, as if they were independent.
        """
        recovery = self.tidy.query("measure == 'recovery' and text == ''").fillna({"seed": -1})
        # a seed that a setting has twice counts once, as it was measured last
        recovery = recovery.drop_duplicates(["setting", "seed"], keep="last")
        tables = (
            recovery.pivot(index="setting", columns="seed", values=n) for n in ("value", "se")
        )
        (fine, coarse), errors = (
            [table.reindex(pairs[grain]).set_axis(pairs.index) for grain in ("fine", "coarse")]
            for table in tables
        )
        gaps = fine - coarse
        alone = 1.96 * np.hypot(*errors).where(gaps.notna()).max(axis=1)
        n = gaps.count(axis=1)
        half = half_interval(gaps.std(axis=1), n).where(n > 1, alone)
        return pairs.assign(value=gaps.mean(axis=1), n=n, half=half)[n > 0]

    def series_over(self, column: str, settings: pd.DataFrame) -> pd.DataFrame:
        """Return settings that differ in one column only, series by series, sorted by it in each.

        They have `series` and `at` besides, and each series holds two values of the column or more.
        """
        scored = self.estimate(settings, "nll")["n"] > 0
        known = settings[settings[column].notna() & scored]
        along = _ALONG.get(column, (column,))
        known = known.assign(at=known[column], series=[setting_of(h, along) for h in known["head"]])
        # a series of one value says nothing about the column
        known = known[known.groupby("series")["at"].transform("nunique") > 1]
        order = dict(zip(known.index, pd.factorize(known["series"])[0], strict=True))
        values = known["at"].to_dict()
        # "by rule" stands behind every number
        place = {s: (order[s], isinstance(at, str), at) for s, at in values.items()}
        return known.loc[sorted(known.index, key=place.__getitem__)]


def half_interval(spread: Any, n: Any) -> Any:
    """Return half of the 95 % interval of a mean over n values by Student's t; NaN where n = 1."""
    return student_t.ppf(0.975, np.maximum(n - 1, 1)) * spread / np.sqrt(n)


def mean_interval(values: pd.Series) -> tuple[float, float, int]:
    """Return the mean, half of its 95 % interval (NaN for one value), and the number of values."""
    n = len(values)
    return float(values.mean()), float(half_interval(values.std(ddof=1), n)), n


def largest_error(estimates: pd.DataFrame) -> float:
    """Return the error of a mean over methods: their mean error; NaN where one has none.

    That is the largest standard error the mean can have: the methods share models and held-out
    text, so their errors go together to an unknown degree.
    """
    errors = estimates["error"] / np.sqrt(estimates["n"])
    return math.nan if errors.isna().any() else float(errors.mean())


def by(
    settings: pd.DataFrame, column: str, default: str = "?"
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield (value, settings) in the order of the settings."""
    for value, part in settings.groupby(settings[column].fillna(default), sort=False):
        yield str(value), part


def parts(frame: pd.DataFrame, at_most: int) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield rows in parts of at most this many, each with what its title adds."""
    count = math.ceil(len(frame) / at_most)
    for i in range(count):
        title = f" ({i + 1} of {count})" if count > 1 else ""
        yield title, frame.iloc[i * at_most : (i + 1) * at_most]


def split(frame: pd.DataFrame, at_most: int) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield (paradigm, what the title adds, rows): apart by paradigm where they are many.

    The paradigm is empty where they are few.
    """
    many = len(frame) > MANY
    for paradigm, some in by(frame, "paradigm", "other") if many else [("", frame)]:
        for title, part in parts(some, at_most):
            yield paradigm, f"{paradigm and f', {paradigm}'}{title}", part
