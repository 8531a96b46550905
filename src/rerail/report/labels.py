"""How rows are named: by their budget, and by what varies among them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from rerail.report.words import number
from rerail.run.results import Row

BUDGETS = ("ratio", "bits", "skip")
FIELDS = (*BUDGETS, "samples", "calibration", "allocation", "distill")
_LONG = {"ratio": "ratio {}", "bits": "{} bits", "skip": "skips {}", "samples": "{} samples"}
_SHORT = {"ratio": "r{}", "bits": "{} bits", "skip": "skips {}", "samples": "n{}"}


class Headed(Protocol):
    """A cell or a setting."""

    @property
    def head(self) -> Row:
        """The row that shows the choices."""


def shown(row: Row, column: str) -> Any:
    """Return a column as it is shown: the budget of a row is one of ratio, bits and skip.

    A quantiser is swept by bits and a skipper by the share it skips, and then the ratio is none of
    their choices.
    """
    if column not in BUDGETS:
        return row[column]
    swept = "skip" if row["paradigm"] == "skipping" else "ratio"
    swept = "bits" if row["bits"] is not None else swept
    if column != swept:
        return None
    if swept == "skip" and row["ratio"] is None:
        return "by rule"
    return row["bits" if swept == "bits" else "ratio"]


def varying(settings: Iterable[Headed]) -> list[str]:
    """Return the columns among `FIELDS` that hold more than one value.

    Where there are several budgets, of whatever kind, every kind that is there.
    """
    heads = [setting.head for setting in settings]
    values = {name: {shown(row, name) for row in heads} - {None} for name in FIELDS}
    several = sum(len(values[name]) for name in BUDGETS) > 1
    return [n for n in FIELDS if len(values[n]) > 1 or (several and n in BUDGETS and values[n])]


def columns_of(cells: Sequence[Headed]) -> list[str]:
    """Return the columns by which a table names cells: their budget, and what varies.

    The budget is `ratio`, or `budget` where there is another kind.
    """
    heads = [cell.head for cell in cells]
    kinds = {name for name in BUDGETS for row in heads if shown(row, name) is not None}
    seeds = ["seed"] if len({row["seed"] for row in heads}) > 1 else []
    others = [name for name in varying(cells) if name not in BUDGETS]
    return ["ratio" if kinds <= {"ratio"} else "budget", *others, *seeds]


def budget_of(row: Row) -> tuple[Any, str]:
    """Return the budget of a row and what it is a number of, `(None, "")` without one."""
    words = {"ratio": "removed", "bits": "bits", "skip": "skipped"}
    known = ((shown(row, name), said) for name, said in words.items())
    return next(((value, said) for value, said in known if value is not None), (None, ""))


def label_of(row: Row, columns: Iterable[str], first: str = "compressor") -> str:
    """Return a label, as in `reap, ratio 0.5, 64 samples`; any budget stands for every kind."""
    return _label(row, columns, first, ", ", _LONG)


def short_label(row: Row, columns: Iterable[str], first: str = "compressor") -> str:
    """Return a label for figures, as in `reap r0.5 n64`."""
    return _label(row, columns, first, " ", _SHORT)


def _label(
    row: Row, columns: Iterable[str], first: str, comma: str, said: Mapping[str, str]
) -> str:
    wanted = [one for name in columns for one in (BUDGETS if name in BUDGETS else (name,))]
    values = [(name, shown(row, name)) for name in dict.fromkeys(wanted)]
    parts = [said.get(name, "{}").format(number(v)) for name, v in values if v is not None]
    return comma.join([str(row[first] or "?"), *parts])
