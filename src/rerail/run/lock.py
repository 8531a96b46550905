"""One process a cell: another one waits, and then finds what the first has made."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rerail.files import make_folder, refusals
from rerail.parallel import is_first

log = logging.getLogger(__name__)


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Wait until no other process works on a cell, and keep others waiting inside the block.

    The lock is the system's on `.<folder>.lock` beside the folder, so that it ends with its
    process, however that ends, and stays when the folder is removed. Of a group of processes the
    first one has it. Where the file system knows no locks nobody waits: every file is whole or
    absent in any case.

    Raises:
        InputError: nothing can be written beside the folder.
    """
    if not is_first():
        yield
        return
    path = folder.with_name(f".{folder.name}.lock")
    make_folder(folder.parent)
    with refusals(path):
        file = _locked(path)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(file)


def _locked(path: Path) -> int | None:
    """Return the open file once it is locked; None where there are no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process works on %s; waiting for it", path.name[1:-5])
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            os.close(file)
            return None
        # the one before removed its file: whoever comes now would lock another one
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file)):
                return file
        os.close(file)
