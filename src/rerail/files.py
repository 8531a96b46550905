"""Files that are either whole or absent: temporary name, then rename."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rerail.config.secrets import redacted
from rerail.errors import InputError


def cache_dir() -> Path:
    """Return the folder of reusable artefacts: `RERAIL_CACHE`, or a folder in the user's cache."""
    if folder := os.environ.get("RERAIL_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
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
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name only when the block succeeds.

    Works for a file or a folder. Racing writers cannot mix: the last rename wins.

    Raises:
        InputError: no space is left on the device.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _take_name(temporary, path)
    except Exception as error:
        if _is_full(error):
            raise InputError(
                f"no space left on the device that holds {path.parent}; "
                "free some or set RERAIL_CACHE"
            ) from error
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _take_name(temporary: Path, path: Path) -> None:
    """Rename; a folder in the way goes first, and again where another writer put one there."""
    while True:
        try:
            temporary.replace(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        with contextlib.suppress(FileNotFoundError):
            path.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _is_full(error: Exception) -> bool:
    # safetensors writes from Rust and names the same condition in words
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "(os error 28)" in str(error)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, without secrets."""
    with whole_file(path) as temporary:
        temporary.write_text(
            json.dumps(redacted(value), indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
