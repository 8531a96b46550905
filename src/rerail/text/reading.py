"""Texts of a user's files: txt, jsonl, json and parquet, each also compressed by xz."""

import codecs
import contextlib
import importlib
import io
import itertools
import json
import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rerail.errors import InputError
from rerail.files import file_digest
from rerail.text.tokens import Text

KINDS = (".txt", ".jsonl", ".json", ".parquet")
# A packed file may unpack to so many times its size, and to so many bytes in any case. Text that
# is packed by xz grows 3 to 10 times, and what repeats itself seldom 50 times.
EXPANSION = 100
LARGEST = 2**28

_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair
_CHUNK = 2**20  # bytes
_ROWS = 64  # of a parquet file, at a time


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


def read_rows(path: Path, column: str) -> list[tuple[int, Text]]:
    """Return (row, text) for each row of a file that holds text.

    A txt file is one row, and is read only as far as its text is sliced; of it, only that part is
    checked.

    Raises:
        InputError: the file is damaged, not UTF-8 or not JSON, lacks the column, is empty, or
            unpacks to far more than any text does.
    """
    rows: list[tuple[int, Text]]
    if _kind(path) == ".txt":
        text = _FileText(path)
        rows = [] if text.is_blank() else [(0, text)]
    elif _kind(path) == ".parquet":
        records = ({column: value} for value in _parquet_column(path, column))
        rows = _texts(records, column, path)
    else:
        rows = _texts(_parse_records(path), column, path)
    if not rows:
        raise InputError(f"{path} is empty: it has no text to calibrate or evaluate with")
    return rows


class _FileText:
    """The text of a file, of which no more is read than is looked at."""

    def __init__(self, path: Path):
        self._path, self._start, self._is_whole = path, "", False

    def __getitem__(self, where: slice, /) -> str:
        """Return the characters at these places, which count from the beginning."""
        while not self._is_whole and (where.stop is None or where.stop > len(self._start)):
            self._read(where.stop)
        return self._start[where]

    def is_blank(self) -> bool:
        """Return whether there is nothing but white space."""
        while not self._is_whole and not self._start.strip():
            self._read(len(self._start) + 1)
        return not self._start.strip()

    def _read(self, length: int | None) -> None:
        """Read the first characters again: four times as many, so that no file stays open."""
        length = None if length is None else max(length, 4 * len(self._start))
        parts, size = [], 0
        for part in _decoded(self._path):
            parts.append(part)
            size += len(part)
            if length is not None and size >= length:
                break
        else:
            self._is_whole = True
        self._start = "".join(parts)


def _texts(records: Iterable[Any], column: str, path: Path) -> list[tuple[int, Text]]:
    rows: list[tuple[int, Text]] = []
    for row, record in enumerate(records):
        text = text_of(record, column, f"{path}, row {row}")
        if text and not text.isspace():
            rows.append((row, text))
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
    return _HALF.sub("?", value) if _HALF.search(value) else value


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


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, unpacked, a MiB at a time.

    Raises:
        InputError: it cannot be read, or unpacks to far more than any text does.
    """
    packed, size = path.suffix == ".xz", 0
    with _errors_as_sentences(path), lzma.open(path) if packed else path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            if packed:
                _check_unpacked(size, path)
            yield chunk


def _check_unpacked(size: int, path: Path) -> None:
    largest = max(LARGEST, EXPANSION * path.stat().st_size)
    if size > largest:
        raise InputError(
            f"{path} unpacks to more than {largest:,} bytes, {EXPANSION} times its own size and "
            "more than text does; it is damaged or made to fill the memory, so unpack it first"
        )


@contextlib.contextmanager
def _errors_as_sentences(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); name a readable file, whole if it ends in .xz"
        ) from error


def _decoded(path: Path) -> Iterator[str]:
    """Yield the text of a file, a chunk at a time."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    start = 0  # of what is decoded next, in bytes
    for chunk in itertools.chain(_chunks(path), [b""]):
        waiting = len(decoder.getstate()[0])  # bytes of half a character before the chunk
        try:
            yield decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            byte = f"byte {start - waiting + error.start} is 0x{error.object[error.start]:02x}"
            raise InputError(f"{path} is not UTF-8 ({byte}); convert it first") from error
        start += len(chunk)


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file; of what unpacks to many, no more is in memory than one."""
    parts: list[str] = []
    for text in _decoded(path):
        # not splitlines(): JSON strings may hold U+2028 and its like unescaped
        first, *others = text.split("\n")
        parts.append(first)
        for other in others:
            yield "".join(parts)
            parts = [other]
    yield "".join(parts)


def _parse_records(path: Path) -> Iterator[Any]:
    if _kind(path) == ".json":
        text = "".join(_decoded(path))
        value = _parse_json(text, str(path)) if text.strip() else []
        yield from value if isinstance(value, list) else [value]
        return
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _parse_json(line, f"{path}, line {number}")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line belongs in .jsonl" if error.msg == "Extra data" else ""
        message = f"{where} is not JSON ({error.msg} at character {error.pos}){hint}"
        raise InputError(message) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number too long
        raise InputError(f"{where} cannot be read as JSON ({error})") from error


def _parquet_column(path: Path, column: str) -> Iterator[Any]:
    """Yield the values of a column, a few rows in memory at a time."""
    parquet = importlib.import_module("pyarrow.parquet")
    arrow = importlib.import_module("pyarrow")
    try:
        packed = path.suffix == ".xz"
        file = parquet.ParquetFile(io.BytesIO(b"".join(_chunks(path))) if packed else path)
        names = file.schema_arrow.names
        if column not in names:
            raise InputError(f"{path} has no column {column!r}; it has {', '.join(names)}")
        groups = range(file.num_row_groups)
        _check_unpacked(sum(file.metadata.row_group(i).total_byte_size for i in groups), path)
        size = 0  # of the values, of which a packed page may hold one many times
        for batch in file.iter_batches(_ROWS, columns=[column]):
            size += batch.nbytes
            _check_unpacked(size, path)
            yield from batch[column].to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {error}") from error
