"""Files that are either whole or absent: temporary name, then rename."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rerail.config.secrets import redacted
from rerail.errors import InputError

LARGEST = 2**28  # bytes of a JSON file that is read: a row of a large model has about 10**5
DEEPEST = 64  # containers around a value of JSON; the choices of a cell have about ten

_FULL = (errno.ENOSPC, errno.EDQUOT)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR)
# what the file system says of an open file, without a name
_OF_A_FILE = (*_FULL, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE)
_IN_RUST = re.compile(r"\(os error (\d+)\)")


def cache_dir() -> Path:
    """Return the folder of reusable artefacts: `RERAIL_CACHE`, or a folder in the user's cache.

    Raises:
        InputError: it is below a home folder, and no such home is known.
    """
    try:
        if folder := os.environ.get("RERAIL_CACHE"):
            return Path(folder).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise InputError(f"there is no folder for the cache ({error}); set RERAIL_CACHE") from error
    return Path(base) / "rerail"


def digest(value: Any) -> str:
    """Return 16 hex digits that identify a JSON-serialisable value (keys sorted)."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def refusals(*paths: Path) -> Iterator[None]:
    """Turn into a sentence what the file system refuses at or below these paths, or above them.

    Raises:
        InputError: no space, no permission, something in the way, a name that is too long ...
    """
    for path in paths:
        _check_name(path)
    try:
        yield
    except Exception as error:
        number, where = _refusal(error, paths)
        if number in _FULL:
            raise InputError(
                f"no space left on the device that holds {paths[0].parent}; "
                "free some or set RERAIL_CACHE"
            ) from error
        if number:
            way = "a file or a link that leads nowhere is in the way"
            reason = way if number in _IN_THE_WAY else os.strerror(number).lower()
            raise InputError(
                f"{paths[0]} cannot be written ({where}{reason}); give another place: out=FOLDER "
                "or --out, and RERAIL_CACHE for the cache"
            ) from error
        raise


def _check_name(path: Path) -> None:
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        name = b"\0"
    if b"\0" in name:
        raise InputError(f"{str(path)!r} is no name of a file: it holds NUL or half a character")


def _refusal(error: Exception, paths: tuple[Path, ...]) -> tuple[int, str]:
    """Return the number of a refusal and its place in words; 0 where it is none of these paths."""
    if match := _IN_RUST.search(str(error)):
        return int(match[1]), ""  # safetensors writes from Rust and says the number in words
    if not isinstance(error, OSError) or error.errno is None:
        return 0, ""
    names = [name for name in (error.filename2, error.filename) if isinstance(name, str)]
    for name in names:
        if any(p.is_relative_to(name) or Path(name).is_relative_to(p) for p in paths):
            return error.errno, f"{name}: " if Path(name) != paths[0] else ""
    return (error.errno if not names and error.errno in _OF_A_FILE else 0), ""


def is_folder(path: Path) -> bool:
    """Return whether a folder is there; a name that cannot be one is no error."""
    return os.path.isdir(path)  # noqa: PTH112  (Path.is_dir raises for a name that is too long)


def make_folder(path: Path) -> Path:
    """Make a folder where there is none, and return it.

    Raises:
        InputError: it cannot be made.
    """
    with refusals(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder that is gone afterwards.

    Raises:
        InputError: none can be made, or it cannot be written.
    """
    try:
        made = tempfile.TemporaryDirectory()
    except OSError as error:
        raise InputError(f"no temporary folder can be made ({error}); set TMPDIR") from error
    with made as name, refusals(Path(name)):
        yield Path(name)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file in one write, so that a killed process cuts off at most the last one.

    Secrets are redacted.

    Raises:
        InputError: it cannot be written, or is no regular file.
    """
    make_folder(path.parent)
    check_replaceable(path)
    with refusals(path), path.open("a", encoding="utf-8") as out:
        out.write(f"{redacted(line)}\n")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name only when the block succeeds.

    Works for a file or a folder. Racing writers cannot mix: the last rename wins. A pipe, a device
    or a link is not replaced.

    Raises:
        InputError: `path` cannot be written.
    """
    # part of the name is enough to know it by, and a long one leaves no room for more
    temporary = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:8]}.tmp")
    with refusals(path, temporary):
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _take_name(temporary, path)
        finally:
            _remove(temporary)


def check_replaceable(path: Path) -> None:
    """Check that a name is free, or of a regular file or a folder.

    Raises:
        InputError: it is of a link, a pipe, a device or a socket.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # nothing is there
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a link" if stat.S_ISLNK(mode) else "a pipe, a device or a socket"
        raise InputError(f"{path} is {kind}, not a regular file; remove it or give another name")


def _remove(path: Path) -> None:
    """Remove what was not finished, as far as the file system lets."""
    with contextlib.suppress(OSError):
        path.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)


def _take_name(temporary: Path, path: Path) -> None:
    """Rename; a folder in the way goes first, and again where another writer put one there."""
    while True:
        try:
            temporary.replace(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # a folder cannot take the name of one that is not empty, and deleting that one where it is
        # would leave half of it for a while: so it is renamed away
        old = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:8]}.old")
        with contextlib.suppress(FileNotFoundError):
            path.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, without secrets."""
    with whole_file(path) as temporary:
        temporary.write_text(
            json.dumps(redacted(value), indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )


def read_text(path: Path) -> str:
    """Return the text of a file that anybody may have written.

    Raises:
        InputError: it is no regular file, cannot be read, or is too large.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is no regular file")
        if status.st_size > LARGEST:
            raise InputError(f"{path} has more than {LARGEST:,} bytes, too many to read")
        return path.read_text(encoding="utf-8")
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file that anybody may have written.

    Raises:
        InputError: as `read_text`, or it is too deep, or no JSON.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
        if "\\ud" in text.lower():  # half a character can be read, and never written again
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise InputError(f"{path} cannot be read (it is nested too deeply)") from error
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    if _is_deep(content):
        raise InputError(f"{path} cannot be read (it is nested too deeply)")
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(DEEPEST):
        inner = [item for item in level if isinstance(item, dict | list)]
        level = [v for item in inner for v in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return True
