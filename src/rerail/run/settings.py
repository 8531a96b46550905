"""Settings: what rows share that differ in their seeds only, and how rows are named.

Numbers of cells are put together only over the same held-out tokens.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from rerail.files import digest

Fields = Mapping[str, Any]  # a result row

BUDGETS = ("ratio", "bits", "skip")
VARYING = (*BUDGETS, "samples", "calibration", "allocation", "distill")
_PLACE = ("path_or_id", "revision", "name")  # of a model, among its choices
_UNITS = {"ratio": "removed", "bits": "bits", "skip": "skipped"}
_CHOSEN = ("ratio", "samples", "calibration", "allocation", "distill")
_LONG = {"ratio": "ratio {}", "bits": "{} bits", "skip": "skips {}", "samples": "{} samples"}
_SHORT = {"ratio": "r{}", "bits": "{} bits", "skip": "skips {}", "samples": "n{}"}


def tokens_of(row: Fields) -> str:
    """Return what identifies the held-out tokens of a row: only equal ones may be compared."""
    texts = {name: score.get("tokens") for name, score in (row["nll_by"] or {}).items()}
    asked = ((row["choices"] or {}).get("evaluation") or {}).get("texts")
    return digest([row["tokens"], row["heldout"], texts, asked])


def tokens_label(row: Fields) -> str:
    """Return the held-out texts of a row in words, as in `docs, speeches (32,640 tokens)`."""
    names = ", ".join(sorted(row["nll_by"] or {})) or "held-out text"
    return f"{names} ({row['tokens'] or 0:,} tokens)"


def setting_of(row: Fields, dropped: Iterable[str] = ()) -> str:
    """Return what identifies a row's choices, seeds and the dropped groups left out.

    A model is known by its fingerprint, however it is named, wherever it lies.
    """
    gone = {"command", "names", *dropped}
    choices = dict(row["choices"] or {})
    names = {k: v for k, v in (choices.get("names") or {}).items() if k not in gone}
    # seeds of the evaluation stay: they choose the held-out tokens
    rest = {
        name: value if name == "evaluation" else _seedless(value, gone)
        for name, value in choices.items()
        if name not in gone | {"seed"}
    }
    columns = {name: row[name] for name in ("model", "compressor", *_CHOSEN) if name not in gone}
    if "model" not in gone and row["fingerprint"] is not None:
        columns["model"], model = row["fingerprint"], choices.get("model") or {}
        rest["model"] = {k: v for k, v in model.items() if k not in _PLACE}
        names.pop("model", None)
    return digest([rest, names, columns, tokens_of(row)])


def _seedless(value: Any, gone: set[str]) -> Any:
    """Drop seeds at any depth, and `calibration.samples` where samples are left out."""
    if not isinstance(value, Mapping):
        return value
    hidden = {"seed"} | ({"samples"} & gone)
    return {k: _seedless(inner, gone) for k, inner in value.items() if k not in hidden}


def _budget(row: Fields) -> tuple[str, Any]:
    """Return the kind of a row's budget, one of `BUDGETS`, and its value.

    A quantiser is swept by bits and a skipper by the share it skips, and then the ratio is none of
    their choices.
    """
    if row["bits"] is not None:
        return "bits", row["bits"]
    if row["paradigm"] == "skipping":
        return "skip", "by rule" if row["ratio"] is None else row["ratio"]
    return "ratio", row["ratio"]


def shown(row: Fields, column: str) -> Any:
    """Return a column as it is shown: the budget of a row is one of ratio, bits and skip."""
    kind, value = _budget(row)
    if column in BUDGETS:
        return value if column == kind else None
    return row[column]


def budget_of(row: Fields) -> tuple[Any, str]:
    """Return the budget of a row and what it is a number of, `(None, "")` without one."""
    kind, value = _budget(row)
    return value, "" if value is None else _UNITS[kind]


def label_of(row: Fields, columns: Iterable[str]) -> str:
    """Return a label, as in `reap, ratio 0.5, 64 samples`; any budget stands for every kind."""
    return ", ".join(_words(row, columns, _LONG))


def short_label(row: Fields, columns: Iterable[str]) -> str:
    """Return a label for figures, as in `reap r0.5 n64`."""
    return " ".join(_words(row, columns, _SHORT))


def _words(row: Fields, columns: Iterable[str], formats: Mapping[str, str]) -> list[str]:
    wanted = [name for column in columns for name in (BUDGETS if column in BUDGETS else (column,))]
    values = {name: shown(row, name) for name in dict.fromkeys(wanted)}
    parts = [formats.get(n, "{}").format(number(v)) for n, v in values.items() if v is not None]
    return [str(row["compressor"] or "?"), *parts]


def number(value: Any) -> str:
    """Return a number without needless zeros, any other value as text, nothing for None."""
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)
