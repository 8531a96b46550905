"""Rows of results: result.json is the truth, results.csv its flat copy.

A row is a plain dict, one for each stage of a cell. `COLUMNS` names every column; a column that
does not apply holds None, and an unknown or missing one is refused: files of one version agree.
"""

import csv
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rerail.errors import InputError
from rerail.evaluate.estimates import Recovery, mean_and_se, paired_difference, recovery_of
from rerail.files import digest, whole_file, write_json

__all__ = [
    "COLUMNS",
    "Recovery",
    "Row",
    "choices_key",
    "gather",
    "mean_and_se",
    "new_row",
    "paired_difference",
    "read_rows",
    "recovery_of",
    "validate_row",
    "write_csv",
    "write_rows",
]

log = logging.getLogger(__name__)

Row = dict[str, Any]

RESULT = "result.json"


class Column(NamedTuple):
    """What a column holds: its type and its meaning with the unit."""

    kind: type
    meaning: str


COLUMNS: dict[str, Column] = {
    "key": Column(str, "hash of all choices of the cell"),
    "status": Column(str, "done, failed or not_applicable"),
    "reason": Column(str, "why a cell is not done"),
    "model": Column(str, "name of the model"),
    "granularity": Column(str, "fine (I <= H) or coarse"),
    "compressor": Column(str, "name of the compression method"),
    "paradigm": Column(str, "pruning, merging, editing ..."),
    "paper": Column(str, "arXiv number of the method"),
    "ratio": Column(float, "asked share to remove"),
    "bits": Column(float, "asked average bits of an expert's number, for quantisers"),
    "allocation": Column(str, "how the ratio is spread over layers"),
    "samples": Column(int, "number of calibration blocks"),
    "calibration": Column(str, "name of the calibration text"),
    "distill": Column(str, "name of the repair"),
    "seed": Column(int, "seed of the cell"),
    "stage": Column(str, "teacher, compressed or repaired"),
    "nll": Column(float, "held-out negative log-likelihood, nats a token"),
    "nll_se": Column(float, "its standard error, clustered by block"),
    "tokens": Column(int, "held-out tokens that were scored"),
    "heldout": Column(str, "hash of the held-out token blocks; equal only for the same tokens"),
    "perplexity": Column(float, "exp(nll)"),
    "kl": Column(float, "KL(teacher, this model), nats a token"),
    "kl_se": Column(float, "its standard error, clustered by block"),
    "agreement": Column(float, "share of tokens with the teacher's most likely next token"),
    "agreement_se": Column(float, "its standard error, clustered by block"),
    "routing_changed": Column(float, "share of tokens whose selected set of experts changed"),
    "load_entropy": Column(float, "entropy of the experts' load over its maximum"),
    "bytes": Column(int, "size of the whole model in the checkpoint's dtype"),
    "expert_bytes": Column(int, "size of the routed experts in the checkpoint's dtype"),
    "removed_of_experts": Column(float, "achieved removed share of the routed experts' bytes"),
    "removed_of_model": Column(float, "achieved removed share of the model's bytes"),
    "active_parameters": Column(int, "parameters used a token"),
    "active_experts": Column(float, "experts computed a token and layer, where some are skipped"),
    "memory_bytes": Column(int, "bytes of the student in memory as it was scored"),
    "disk_bytes": Column(int, "bytes of the exported checkpoint's weights"),
    "recovery": Column(float, "(compressed - repaired) / (compressed - teacher), on NLL"),
    "recovery_se": Column(float, "its standard error, jackknife over blocks"),
    "kl_first": Column(float, "validation KL before the repair"),
    "kl_best": Column(float, "lowest validation KL of the repair; its step is kept"),
    "kl_last": Column(float, "validation KL after the last step"),
    "seconds": Column(float, "wall time of making the model: compressing, repairing (teacher: 0)"),
    "evaluation_seconds": Column(float, "wall time of scoring the held-out texts"),
    "peak_memory": Column(int, "peak memory of the stage in bytes"),
    "host": Column(str, "name of the machine"),
    "time": Column(str, "when the row was written, ISO 8601"),
    "revision": Column(str, "git revision of the code"),
    "choices": Column(dict, "every resolved choice of the cell"),
    "nll_by": Column(dict, "text -> {nll, se, tokens}, if repaired {recovery, recovery_se}, too"),
    "curve": Column(list, "points {step, train_kl, val_kl} of the repair"),
    "layers": Column(list, "per MoE layer {layer, routing_changed, load_entropy, load by expert}"),
    "tasks": Column(list, "lm-eval results {task, metric, value, se, n}"),
    "samples_text": Column(str, "continuation of the fixed prompt"),
    "prompt": Column(str, "the fixed prompt"),
}

_ALLOWED = {
    "status": ("done", "failed", "not_applicable"),
    "stage": ("teacher", "compressed", "repaired", None),
    "granularity": ("fine", "coarse", None),
}

_NESTED = frozenset(name for name, column in COLUMNS.items() if column.kind in (dict, list))


def choices_key(choices: Mapping[str, Any]) -> str:
    """Return 16 hex digits that identify the resolved choices, whatever their order.

    `command` is left out: it is how the choices were typed, and two spellings may mean the same.
    """
    return digest({name: value for name, value in choices.items() if name != "command"})


def new_row(**known: Any) -> Row:
    """Return a valid row with the known columns; the others are None, and status is done.

    Raises:
        ValueError: a column is unknown or a value does not fit it.
    """
    row = {**dict.fromkeys(COLUMNS), "status": "done", **known}
    return validate_row({name: row[name] for name in (*COLUMNS, *(row.keys() - COLUMNS.keys()))})


def validate_row(row: Mapping[str, Any]) -> Row:
    """Return the row as plain Python values, in the order of `COLUMNS`.

    Numbers of numpy or torch become int and float. Inside nested columns a number that is not
    finite becomes None, since JSON has none.

    Raises:
        ValueError: a column is unknown or missing, or a value does not fit its column.
    """
    if unknown := sorted(row.keys() - COLUMNS.keys()):
        raise ValueError(f"unknown columns {unknown}; columns are {', '.join(COLUMNS)}")
    if missing := [name for name in COLUMNS if name not in row]:
        raise ValueError(f"missing columns {missing}; give None where a column does not apply")
    return {name: _fitting(name, row[name]) for name in COLUMNS}


def _fitting(name: str, value: Any) -> Any:
    """Return the value of one column as plain Python, or raise ValueError."""
    value = _plain(value)
    if name in _ALLOWED and value not in _ALLOWED[name]:
        allowed = ", ".join(str(one) for one in _ALLOWED[name])
        raise ValueError(f"{name}={value!r} is not one of {allowed}")
    if value is None:
        return None
    kind = COLUMNS[name].kind
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not kind:
        raise ValueError(f"{name}={value!r} is {type(value).__name__}, not {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not finite; write a failed row with the reason")
    return _finite(value) if name in _NESTED else value


def _plain(value: Any) -> Any:
    """Return numbers of array libraries and paths as plain Python, through containers."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and callable(value.item):
        return value.item()
    return value


def _finite(value: Any) -> Any:
    """Return the value with numbers that are not finite replaced by None."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_rows(folder: Path | str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `folder`/result.json whole or not at all, and return its path.

    Raises:
        ValueError: a row does not fit `COLUMNS`.
        InputError: no space is left on the device.
    """
    path = Path(folder) / RESULT
    write_json(path, [validate_row(row) for row in rows])
    return path


def read_rows(folder_or_file: Path | str, recursive: bool = True) -> list[Row]:
    """Read a result.json, or every one in and (when recursive) below a folder, in path order.

    In a folder a file that is damaged, foreign or of another version is reported by a warning and
    left alone, and the others are read.

    Returns:
        All rows; an empty list for a folder without results.

    Raises:
        InputError: the path does not exist, or is a file that holds no rows of this version.
    """
    rows, problems = gather(folder_or_file, recursive)
    for sentence in problems:
        log.warning("%s", sentence)
    return rows


def gather(folder_or_file: Path | str, recursive: bool = True) -> tuple[list[Row], list[str]]:
    """Return the rows as `read_rows` does, and a sentence on each file that could not be read.

    Raises:
        InputError: as `read_rows`.
    """
    path = Path(folder_or_file)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a result.json or a folder that holds one")
    if path.is_file():
        return _rows_of(path), []
    rows: list[Row] = []
    problems: list[str] = []
    for file in _result_files(path, recursive):
        try:
            rows += _rows_of(file)
        except InputError as error:
            problems.append(str(error))
    return rows, problems


def _rows_of(file: Path) -> list[Row]:
    try:
        return [validate_row(row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        message = f"{file} is not a list of result rows ({error}); remove it and run its cell again"
        raise InputError(message) from error


def _result_files(folder: Path, recursive: bool) -> Iterator[Path]:
    """Yield result files in path order."""
    for file in sorted(folder.rglob(RESULT) if recursive else folder.glob(RESULT)):
        if not hidden(file, folder):
            yield file


def hidden(file: Path, folder: Path) -> bool:
    """Return whether a file lies in a hidden folder, or is one: it may not be whole yet."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the scalar columns of all rows, then every choice as `choices.<name>`.

    Floats are written so that they read back equal; None is an empty field.

    Raises:
        ValueError: a row does not fit `COLUMNS`.
    """
    checked = [validate_row(row) for row in rows]
    choices = [dict(_flat(row["choices"] or {}, "choices")) for row in checked]
    extra = sorted({name for one in choices for name in one})
    scalars = [name for name in COLUMNS if name not in _NESTED]
    path = Path(path)
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [*scalars, *extra], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **chosen} for row, chosen in zip(checked, choices, strict=True))
    return path


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, scalar) pairs; a list is one JSON field."""
    for name, one in value.items():
        if isinstance(one, Mapping):
            yield from _flat(one, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", json.dumps(one) if isinstance(one, list) else one
