"""The folder of a cell: what it was made from, whether it is done, and how it failed."""

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rerail.errors import InputError, OutOfReach
from rerail.files import refusals, write_json
from rerail.parallel import is_first
from rerail.run.cell import Cell
from rerail.run.provenance import provenance
from rerail.run.results import RESULT, Row, rows_of, write_rows
from rerail.run.rows import failed_row
from rerail.run.status import Status
from rerail.store import Artefact, read, write

log = logging.getLogger(__name__)

INPUTS, TRACEBACK = "inputs.json", "traceback.txt"


def rows_if_current(cell: Cell, folder: Path) -> list[Row]:
    """Return the rows of a cell that is done with these inputs; none where it must run.

    A folder that was made from other weights, texts or code is forgotten, and a new one notes what
    it is made from.
    """
    inputs = cell.inputs()
    if folder.exists() and made_from(folder) == inputs:
        return finished_rows(folder)
    # asked again: another process may have begun the same cell just now
    if (folder / INPUTS).exists() and made_from(folder) != inputs:
        log.warning("%s was made from other weights or texts and is made again", folder.name)
        _forget(folder)
    write(folder / INPUTS, Artefact(inputs))
    write_json(folder / "config.json", {"choices": dict(cell.choices), **provenance()})
    return []


def made_from(folder: Path) -> Any:
    """Return what `Cell.inputs` was when the folder was made; None where that is not known."""
    stored = read(folder / INPUTS)
    return stored and stored.data


def finished_rows(folder: Path) -> list[Row]:
    """Return the rows of a cell that is done; none where it is not, or they cannot be read."""
    if not os.path.lexists(folder / RESULT):
        return []
    try:
        rows = rows_of(folder / RESULT)
    except InputError as error:
        log.warning("%s", error)
        return []
    return rows if all(row["status"] == "done" for row in rows) else []


def write_refusal(cell: Cell, folder: Path, error: InputError) -> Row:
    """Write that a value cannot be used; a budget out of reach is no failure."""
    status = "not_applicable" if isinstance(error, OutOfReach) else "failed"
    with if_it_can_be_written():
        Status(folder).write(status, "check", str(error))
    return write_failure(cell, folder, status, str(error))


def write_failure(cell: Cell, folder: Path, status: str, reason: str) -> Row:
    """Write the one row of a cell that did not finish."""
    row = failed_row(cell, status, reason)
    if is_first():
        with if_it_can_be_written():
            write_rows(folder, [row])
    return row


@contextlib.contextmanager
def if_it_can_be_written() -> Iterator[None]:
    """Log that a record of a failure cannot be written; the failure itself is what counts."""
    try:
        yield
    except InputError as error:
        log.warning("%s", error)


def _forget(folder: Path) -> None:
    """Remove a folder, out of sight first: another process may begin the same cell meanwhile."""
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    with refusals(folder), contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)
