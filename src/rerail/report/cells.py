"""Rows seen as cells: up to three rows (teacher, compressed, repaired) with one key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from rerail.run.results import STAGES
from rerail.run.settings import budget_of, label_of, shown, tokens_of

Fields = Mapping[str, Any]  # a result row

BLANK = "gap under two standard errors"
UNREPAIRED = "no repair"


@dataclass(frozen=True)
class Cell:
    """The rows of one key, in the order of `STAGES`; a cell that is not done has one row."""

    rows: tuple[Fields, ...]

    @property
    def head(self) -> Fields:
        """The row that shows the choices."""
        return self.rows[0]

    @property
    def done(self) -> bool:
        """Whether every row is done."""
        return all(row["status"] == "done" for row in self.rows)

    @property
    def status(self) -> str:
        """The status in words."""
        return str(self.head["status"]).replace("_", " ")

    @property
    def seconds(self) -> float | None:
        """Wall time of all stages."""
        known = [row["seconds"] for row in self.rows if row["seconds"] is not None]
        return sum(known) if known else None

    def get(self, stage: str, column: str) -> Any:
        """Return a value of a stage, None where the stage or the value is absent."""
        return next((row[column] for row in self.rows if row["stage"] == stage), None)

    def last(self, column: str) -> Any:
        """Return a value of the repaired model, or else of the compressed one."""
        values = (self.get(stage, column) for stage in ("repaired", "compressed"))
        return next((value for value in values if value is not None), None)

    def choice(self, name: str) -> tuple[Any, str]:
        """Return a choice as it is shown, and its unit; `budget` is the budget of any kind."""
        return budget_of(self.head) if name == "budget" else (shown(self.head, name), "")

    @cached_property
    def tokens(self) -> str:
        """What identifies the held-out tokens."""
        return tokens_of(self.head)

    @property
    def texts(self) -> dict[str, list[Fields]]:
        """The scores on each held-out text, stage by stage; empty where there is none."""
        scores = [self.get(stage, "nll_by") or {} for stage in STAGES]
        return {text: [stage.get(text) or {} for stage in scores] for text in scores[0]}

    @cached_property
    def tasks(self) -> dict[tuple[str, str], list[Fields]]:
        """The scores of lm-eval by task and metric, stage by stage; empty where there is none."""
        scores = [
            {(score["task"], score["metric"]): score for score in self.get(stage, "tasks") or ()}
            for stage in STAGES
        ]
        names = dict.fromkeys(name for stage in scores for name in stage)
        return {name: [stage.get(name, {}) for stage in scores] for name in names}

    @property
    def no_recovery(self) -> str:
        """Why the recovery is blank; empty where it is not, or where the cell is not done."""
        if not self.done or self.get("repaired", "recovery") is not None:
            return ""
        return BLANK if self.get("repaired", "nll") is not None else UNREPAIRED

    def name(self, columns: Sequence[str] = ("ratio", "samples")) -> str:
        """Return model, method and these choices, as in `tiny_fine, reap, ratio 0.5`."""
        return f"{self.head['model'] or '?'}, {label_of(self.head, columns)}"

    @property
    def full_name(self) -> str:
        """The name with the seed."""
        seed = self.head["seed"]
        return self.name() + ("" if seed is None else f", seed {seed}")


def cells_of(rows: Sequence[Fields]) -> list[Cell]:
    """Group rows by key and sort: fine models first, then model, method, ratio, samples, seed.

    A key that was measured twice shows the rows that were written last: those after its last
    failure, or that failure itself.
    """
    if not rows:
        return []
    frame = pd.DataFrame([dict(row) for row in rows], dtype=object)
    frame["row"] = list(rows)
    frame["cell"] = [key or f"row {i}" for i, key in enumerate(frame["key"])]
    frame["grain"] = frame["model"].map(_grains(frame)).fillna(2)
    frame = frame.sort_values("time", kind="stable", na_position="first")
    # a failure has no stage and begins a new attempt; only the last attempt of a key counts
    failed = frame["stage"].isna()
    attempt = failed.astype(int).groupby(frame["cell"]).cumsum()
    frame = frame[attempt == attempt.groupby(frame["cell"]).transform("max")]
    # rows that came after a failure replace it
    frame = frame[frame["stage"].notna() | (frame.groupby("cell")["cell"].transform("size") == 1)]
    frame["place"] = frame["stage"].map(dict(zip(STAGES, range(3), strict=True))).fillna(3)
    frame = frame.drop_duplicates(["cell", "place"], keep="last").sort_values("place")
    cells = {cell: Cell(tuple(part["row"])) for cell, part in frame.groupby("cell", sort=False)}
    heads = frame.drop_duplicates("cell").set_index("cell")
    order = heads[["grain", "model", "compressor", "ratio", "samples", "seed", "key"]]
    # what is unknown comes first, as the empty text or as -1
    text = order[["model", "compressor", "key"]].fillna("")
    order = order.assign(**text).fillna(-1).sort_values(list(order))
    return [cells[cell] for cell in order.index]


def _grains(frame: pd.DataFrame) -> dict[str, int]:
    """Return 0 for fine and 1 for coarse models, by what any of their rows says."""
    known = frame.dropna(subset=["granularity"]).drop_duplicates("model", keep="last")
    return {m: int(g == "coarse") for m, g in zip(known.model, known.granularity, strict=True)}
