"""Rows seen as cells: up to three rows (teacher, compressed, repaired) with one key."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from rerail.run.results import STAGES
from rerail.run.settings import budget_of, label_of, shown, tokens_of

Fields = Mapping[str, Any]  # a result row
Item = TypeVar("Item")

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


def grouped(items: Iterable[Item], keys: Iterable[str]) -> dict[str, list[Item]]:
    """Return the items of each key, in the order in which keys first come."""
    groups: dict[str, list[Item]] = {}
    for item, key in zip(items, keys, strict=True):
        groups.setdefault(key, []).append(item)
    return groups


def cells_of(rows: Sequence[Fields]) -> list[Cell]:
    """Group rows by key and sort: fine models first, then model, method, ratio, samples, seed.

    A key that was measured twice shows the rows that were written last: those after its last
    failure, or that failure itself. A name of several models gets digits of each, so that they are
    apart wherever rows are grouped by it.
    """
    rows = sorted(_with_unique_models(rows), key=lambda row: row["time"] or "")
    # what failed before its model was read is of the model that the key was measured on at last
    models = {row["key"]: row["fingerprint"] for row in rows if row["fingerprint"]}
    keys = [_model_and_key(row, models) or f"row {i}" for i, row in enumerate(rows)]
    cells = [Cell(_last_attempt(some)) for some in grouped(rows, keys).values()]
    grains = {r["model"]: r["granularity"] == "coarse" for r in rows if r["granularity"]}

    def place(cell: Cell) -> tuple[Any, ...]:
        # what is unknown comes first, as the empty text or as -1, but for the granularity
        head = cell.head
        model, method, key = (head[n] or "" for n in ("model", "compressor", "key"))
        numbers = (-1 if head[n] is None else head[n] for n in ("ratio", "samples", "seed"))
        return (grains.get(head["model"], 2), model, method, *numbers, key)

    return sorted(cells, key=place)


def _model_and_key(row: Fields, models: Mapping[str | None, str]) -> str:
    """Return what rows of one cell share: of equal choices, but of other weights, is another."""
    fingerprint = row["fingerprint"] or models.get(row["key"], "")
    return f"{row['key']} {fingerprint}" if row["key"] else ""


def _with_unique_models(rows: Sequence[Fields]) -> list[Fields]:
    models: dict[str, set[str]] = {}
    for row in rows:
        models.setdefault(row["model"], set()).update({row["fingerprint"]} - {None})
    return [
        {**row, "model": f"{row['model']} ({row['fingerprint'][:4]})"}
        if row["fingerprint"] and len(models[row["model"]]) > 1
        else row
        for row in rows
    ]


def _last_attempt(rows: Sequence[Fields]) -> tuple[Fields, ...]:
    """Return the last row of each stage after the last failure, or else that failure."""
    # a failure has no stage and begins a new attempt
    stages: dict[str, Fields] = {}
    for row in rows:
        stages = stages | {row["stage"]: row} if row["stage"] else {}
    return tuple(stages[stage] for stage in STAGES if stage in stages) or (rows[-1],)
