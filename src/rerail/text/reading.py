"""Texts of a user's files: txt, jsonl, json and parquet, each also compressed by xz."""

import contextlib
import importlib
import io
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rerail.errors import InputError
from rerail.files import file_digest

KINDS = (".txt", ".jsonl", ".json", ".parquet")


def expand(paths: Sequence[str]) -> list[Path]:
    """Return the files that paths and globs name, each once, in order; a glob's matches are sorted.

    Raises:
        InputError: a path or glob matches no file, or a file is of another kind than `KINDS`.
    """
    files = [match for pattern in paths for match in _matches(pattern)]
    for path in files:
        if _kind(path) not in KINDS:
            raise InputError(
                f"{path} cannot be read as text: its name must end in {', '.join(KINDS)}, "
                "optionally followed by .xz"
            )
    return list(dict.fromkeys(files))


def stem(path: Path) -> str:
    """Return a file's name without its kind and without .xz."""
    return Path(path.name.removesuffix(".xz")).stem


def digest_of(path: Path) -> str:
    """Return the sha256 of a file, in hex.

    Raises:
        InputError: it cannot be read.
    """
    with _errors_as_sentences(path):
        return file_digest(path)


def read_rows(path: Path, column: str) -> list[tuple[int, str]]:
    """Return (row, text) for each row of a file that holds text; a txt file is one row.

    Raises:
        InputError: the file is damaged, not UTF-8 or not JSON, lacks the column, or is empty.
    """
    data = _read_bytes(path)
    if _kind(path) == ".txt":
        values = [_decode(data, path)]
    elif _kind(path) == ".parquet":
        values = _parquet_column(data, column, path)
    else:
        values = [
            text_of(record, column, f"{path}, row {row}")
            for row, record in enumerate(_parse_records(data, path))
        ]
    rows = [(row, text) for row, text in enumerate(values) if text.strip()]
    if not rows:
        raise InputError(f"{path} is empty: it has no text to calibrate or evaluate with")
    return rows


def text_of(record: Any, column: str, where: str) -> str:
    """Return a record's text; null counts as empty, half a surrogate pair as a question mark.

    Raises:
        InputError: the record has no such column, or the column holds something else than text.
    """
    if not isinstance(record, dict):
        raise InputError(f"{where} is not an object with a field {column!r}")
    if column not in record:
        raise InputError(f"{where} has no column {column!r}; it has {', '.join(record) or 'none'}")
    value = record[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(
            f"{where} has {type(value).__name__} in column {column!r} where text is expected"
        )
    return value.encode("utf-8", "replace").decode("utf-8")


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise InputError(f"{pattern} is a folder; name its files, for instance {pattern}/*.txt")
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    if files := sorted(p for p in matches if p.is_file()):
        return files
    raise InputError(f"{pattern} matches no file (looked from {Path.cwd()})")


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".xz")).suffix


def _read_bytes(path: Path) -> bytes:
    with _errors_as_sentences(path):
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data


@contextlib.contextmanager
def _errors_as_sentences(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, lzma.LZMAError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); name a readable file, whole if it ends in .xz"
        ) from error


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise InputError(f"{path} is not UTF-8 ({byte}); convert it first") from error


def _parse_records(data: bytes, path: Path) -> Iterator[Any]:
    text = _decode(data, path)
    if _kind(path) == ".json":
        value = _parse_json(text, str(path)) if text.strip() else []
        yield from value if isinstance(value, list) else [value]
        return
    # not splitlines(): JSON strings may hold U+2028 and its like unescaped
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse_json(line, f"{path}, line {number}")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line belongs in .jsonl" if error.msg == "Extra data" else ""
        message = f"{where} is not JSON ({error.msg} at character {error.pos}){hint}"
        raise InputError(message) from error


def _parquet_column(data: bytes, column: str, path: Path) -> list[str]:
    parquet = importlib.import_module("pyarrow.parquet")
    arrow = importlib.import_module("pyarrow")
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        table = file.read(columns=[column] if column in names else [])
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {error}") from error
    if column not in names:
        raise InputError(f"{path} has no column {column!r}; it has {', '.join(names)}")
    return [
        text_of({column: value}, column, f"{path}, row {row}")
        for row, value in enumerate(table[column].to_pylist())
    ]
