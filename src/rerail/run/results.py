"""Rows of results: result.json is the truth, results.csv its flat copy.

A row is what one step of a cell leaves (teacher, compressed, repaired). A column that does not
apply holds None; an unknown or missing one is refused: files of one version agree.
"""

import csv
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from rerail.config.secrets import redacted
from rerail.errors import InputError
from rerail.files import digest, is_folder, read_json, whole_file, write_json
from rerail.printable import printable, spreadsheet_field

log = logging.getLogger(__name__)

RESULT = "result.json"
_SHOWN = 200  # characters of a value in a sentence about it
STAGES = ("teacher", "compressed", "repaired")


def _whole(value: Any) -> Any:
    # a count that went through numpy or JSON may come as 7.0; a bool is no count
    return int(value) if type(value) is float and value.is_integer() else value


Number = float | None
Error = Annotated[float, Field(ge=0)] | None
Text = str | None
_Bounded = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[_Bounded | None, BeforeValidator(_whole)]
Record = dict[str, Any]

_STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class _Choices(TypedDict, total=False):
    """The choices that readers look into; all others are shown only."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    command: Text
    names: Record | None
    model: Record | None
    evaluation: Record | None


class _OfText(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    nll: Number
    se: Error
    tokens: Count
    recovery: Number
    recovery_se: Error


class _Routing(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    routing_changed: Number
    changed_choices: Number
    changed_mass: Number
    load_entropy: Number
    load: list[Number]


class _OfLayer(_Routing):
    layer: Annotated[int, Field(ge=0, lt=2**31)]


class _Point(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    step: float
    train_kl: Number
    val_kl: Number


class _Score(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    task: str
    metric: str
    value: Number
    se: Error
    n: Count


# What the nested columns hold. They are checked and left as they are, so that a row reads back as
# it was written.
_SHAPES: Mapping[str, TypeAdapter[Any]] = {
    "choices": TypeAdapter(_Choices | None),
    "nll_by": TypeAdapter(dict[str, _OfText] | None),
    "curve": TypeAdapter(list[_Point] | None),
    "layers": TypeAdapter(list[_OfLayer] | None),
    "tasks": TypeAdapter(list[_Score] | None),
}


def _column(meaning: str) -> Any:
    return Field(default=None, description=meaning)


@dataclass(config=ConfigDict(strict=True, allow_inf_nan=False), eq=False)
class Row(Mapping[str, Any]):
    """One row: its columns are fields, and it is the mapping of their names to their values."""

    key: Text = _column("hash of all choices of the cell")
    status: Literal["done", "failed", "not_applicable"] = Field(
        default="done", description="how the cell ended"
    )
    reason: Text = _column("why a cell is not done")
    model: Text = _column("name of the model")
    fingerprint: Text = _column("hash of the model's files; equal only for the same model")
    granularity: Literal["fine", "coarse"] | None = _column("fine (I <= H) or coarse")
    compressor: Text = _column("name of the compression method")
    paradigm: Text = _column("pruning, merging, editing ...")
    paper: Text = _column("arXiv number of the method")
    ratio: Number = _column("asked share to remove")
    bits: Number = _column("asked average bits of an expert's number, for quantisers")
    allocation: Text = _column("how the ratio is spread over layers")
    samples: Count = _column("number of calibration blocks")
    calibration: Text = _column("name of the calibration text")
    distill: Text = _column("name of the repair")
    seed: Count = _column("seed of the cell")
    stage: Literal["teacher", "compressed", "repaired"] | None = _column("the model measured")
    nll: Number = _column("held-out negative log-likelihood, nats a token")
    nll_se: Error = _column("its standard error, clustered by block")
    tokens: Count = _column("held-out tokens that were scored")
    heldout: Text = _column("hash of the held-out token blocks; equal only for the same tokens")
    perplexity: Number = _column("exp(nll)")
    kl: Number = _column("KL(teacher, this model), nats a token")
    kl_se: Error = _column("its standard error, clustered by block")
    esap: Number = _column("mean over tokens of sum_v min(p_teacher, p_this): 1 where equal")
    esap_se: Error = _column("its standard error, clustered by block")
    agreement: Number = _column("share of tokens with the teacher's most likely next token")
    agreement_se: Error = _column("its standard error, clustered by block")
    routing_changed: Number = _column("share of tokens whose selected set of experts changed")
    changed_choices: Number = _column(
        "share of choices (token, slot) answered by other than the teacher's own untouched expert"
    )
    changed_mass: Number = _column("the same share of the gate weight")
    load_entropy: Number = _column("entropy of the experts' load over its maximum")
    bytes: Count = _column("size of the whole model in the checkpoint's dtype")
    expert_bytes: Count = _column("size of the routed experts in the checkpoint's dtype")
    removed_of_experts: Number = _column("achieved removed share of the routed experts' bytes")
    removed_of_model: Number = _column("achieved removed share of the model's bytes")
    active_parameters: Count = _column("parameters used a token")
    active_experts: Number = _column("experts computed a token and layer, where some are skipped")
    memory_bytes: Count = _column("bytes of the student in memory as it was scored")
    disk_bytes: Count = _column("bytes of the exported checkpoint's weights")
    recovery: Number = _column("(compressed - repaired) / (compressed - teacher), on NLL")
    recovery_se: Error = _column("its standard error, jackknife over blocks")
    kl_first: Number = _column("validation KL before the repair")
    kl_best: Number = _column("lowest validation KL of the repair; its step is kept")
    kl_last: Number = _column("validation KL after the last step")
    seconds: Number = _column("wall time of making the model: compressing, repairing (teacher: 0)")
    evaluation_seconds: Number = _column("wall time of scoring the held-out texts")
    peak_memory: Count = _column("peak memory of the stage in bytes")
    host: Text = _column("name of the machine")
    time: Text = _column("when the row was written, ISO 8601")
    revision: Text = _column("git revision of the code")
    choices: Record | None = _column("every resolved choice of the cell")
    nll_by: Record | None = _column(
        "text -> {nll, se, tokens}, if repaired {recovery, recovery_se}, too"
    )
    curve: list[Record] | None = _column("points {step, train_kl, val_kl} of the repair")
    layers: list[Record] | None = _column(
        "per MoE layer {layer, routing_changed, changed_choices, changed_mass, load_entropy, "
        "load by expert}"
    )
    tasks: list[Record] | None = _column("lm-eval results {task, metric, value, se, n}")
    samples_text: Text = _column("continuation of the fixed prompt")
    prompt: Text = _column("the fixed prompt")

    def __getitem__(self, name: str) -> Any:
        if name not in COLUMNS:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(COLUMNS)

    def __len__(self) -> int:
        return len(COLUMNS)


class Column(NamedTuple):
    """What a column holds: its type and its meaning with the unit."""

    kind: type
    meaning: str


def _kind(hint: Any) -> type:
    """Return the plain type of a field: of `list[Record] | None` it is list, of a Literal str."""
    for part in (hint, *get_args(hint)):
        if (kind := get_origin(part) or part) in (str, float, int, dict, list):
            return kind  # type: ignore[no-any-return]
    return str


_FIELDS: Mapping[str, Any] = Row.__pydantic_fields__  # type: ignore[attr-defined]
COLUMNS = {
    name: Column(_kind(hint), _FIELDS[name].description)
    for name, hint in get_type_hints(Row).items()
    if name in _FIELDS
}
SCALARS = [name for name, column in COLUMNS.items() if column.kind not in (dict, list)]


def choices_key(choices: Mapping[str, Any]) -> str:
    """Return 16 hex digits that identify the resolved choices, whatever their order.

    `command` is left out: it is how the choices were typed, and two spellings may mean the same.
    """
    return digest({name: value for name, value in choices.items() if name != "command"})


def new_row(**known: Any) -> Row:
    """Return a row with the known columns; the others are None, and status is done.

    Raises:
        ValueError: a column is unknown or a value does not fit it.
    """
    return validate_row({**dict.fromkeys(COLUMNS), "status": "done", **known})


def validate_row(row: Mapping[str, Any]) -> Row:
    """Return the row with plain Python values.

    Numbers of numpy or torch become int and float. Inside nested columns a number that is not
    finite becomes None, since JSON has none.

    Raises:
        ValueError: a column is unknown or missing, or a value does not fit its column.
    """
    if unknown := sorted(row.keys() - COLUMNS.keys()):
        raise ValueError(f"unknown columns {unknown}; columns are {', '.join(COLUMNS)}")
    if missing := [name for name in COLUMNS if name not in row]:
        raise ValueError(f"missing columns {missing}; give None where a column does not apply")
    column = ""
    try:
        checked = Row(**{name: _plain(row[name]) for name in COLUMNS})
        for column, shape in _SHAPES.items():
            shape.validate_python(checked[column])
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, (column, *first["loc"]))).strip(".")
        allowed = first["msg"][0].lower() + first["msg"][1:]
        value = repr(first["input"])
        shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
        raise ValueError(f"{field}={shown}: {allowed}") from error
    return checked


def _plain(value: Any, nested: bool = False) -> Any:
    """Return paths and numbers of array libraries as plain Python, through containers."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, True) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, True) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if callable(getattr(value, "item", None)):
        value = value.item()
    return None if nested and isinstance(value, float) and not math.isfinite(value) else value


def write_rows(folder: Path | str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `folder`/result.json whole or not at all, and return its path.

    Raises:
        ValueError: a row does not fit `COLUMNS`.
        InputError: the file cannot be written.
    """
    path = Path(folder) / RESULT
    write_json(path, [dict(validate_row(row)) for row in rows])
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
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist; give a result.json or a folder that holds one")
    if not is_folder(path):
        return rows_of(path), []
    rows: list[Row] = []
    files, problems = files_named(RESULT, path, recursive)
    for file in files:
        try:
            rows += rows_of(file)
        except InputError as error:
            problems.append(str(printable(str(error))))
    return rows, problems


def rows_of(file: Path) -> list[Row]:
    """Return the rows of one file.

    Raises:
        InputError: it cannot be read, or is no list of rows of this version.
    """
    rows: list[Row] = []
    place = ""
    try:
        for i, row in enumerate(read_json(file)):
            place = f"row {i}: "
            rows.append(validate_row(row))
    except InputError as error:
        raise InputError(f"{error}; remove it and run its cell again") from error
    except (ValueError, AttributeError, TypeError) as error:
        message = f"{file} is not a list of result rows ({place}{error}); "
        raise InputError(f"{message}remove it and run its cell again") from error
    return rows


def files_named(
    name: str, folder: Path, recursive: bool = True
) -> tuple[Sequence[Path], list[str]]:
    """Return the files of a name in (and below) a folder, in path order, hidden folders left out.

    Links to folders are not followed. What stands under the name may still be no file.

    Returns:
        The paths, and a sentence on each folder that cannot be read.
    """
    files, problems, folders = [], [], [folder]
    while folders:
        here = folders.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name == name:
                        files.append(Path(entry.path))
                    elif recursive and not entry.name.startswith("."):
                        folders += [Path(entry.path)] if entry.is_dir(follow_symlinks=False) else []
        except OSError as error:
            problems.append(str(printable(f"{here} cannot be read ({error.strerror})")))
    return sorted(files), problems


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the scalar columns of all rows, then every choice as `choices.<name>`.

    Floats are written so that they read back equal; None is an empty field. A text that a
    spreadsheet would run as a formula begins with `'`, and no character acts on a terminal.

    Raises:
        ValueError: a row does not fit `COLUMNS`.
        InputError: the file cannot be written.
    """
    checked = [validate_row(row) for row in rows]
    choices = [dict(_flat(row.choices or {}, "choices")) for row in checked]
    columns = [*SCALARS, *sorted({name for chosen in choices for name in chosen})]
    path = Path(path)
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row, chosen in zip(checked, choices, strict=True):
            fields = redacted({**row, **chosen})
            writer.writerow({name: spreadsheet_field(fields.get(name)) for name in columns})
    return path


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, scalar) pairs; a list is one JSON field."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}.{name}")
        else:
            field = str(printable(f"{prefix}.{name}"))
            yield field, json.dumps(inner) if isinstance(inner, list) else inner
