"""OUT/sweeps/<id>/: what was asked for, with which code, and as which jobs."""

import contextlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import rerail
from rerail.errors import InputError
from rerail.files import make_folder, read_json, refusals, write_json
from rerail.processes import this_process
from rerail.run.results import RESULT, rows_of
from rerail.run.task import SweepCell

log = logging.getLogger(__name__)

SWEEPS = "sweeps"
REVISION = "revision.txt"

_REFUSED = re.compile(r"failed-[0-9a-f]{8}")  # as `rerail.run.rows.failed_choice` names them
JOB = re.compile(r"[0-9]{1,20}(_[0-9]{1,20})?\Z")


@dataclass(frozen=True)
class Sweep:
    """What is on disk of one sweep.

    Attributes:
        path: OUT/sweeps/<id>.
        cells: {n, folder (below OUT), key, command, state when it was submitted}.
        process: host, pid and start time of the command that started it.
        jobs: n -> Slurm job id; empty for a sweep in one process.
        executor: here or slurm.
        cluster: `local` for the one of slurm/local, else nothing.
    """

    path: Path
    cells: Sequence[Mapping[str, Any]]
    process: Mapping[str, Any]
    jobs: Mapping[str, str]
    executor: str
    cluster: str

    def log_of(self, job: str) -> Path:
        """Return the file with what a job wrote to its standard error."""
        return self.path / "jobs" / f"{job}_0_log.err"


def new_sweep(out: Path) -> Path:
    """Make and return OUT/sweeps/<id>; ids sort by time.

    Raises:
        InputError: OUT cannot be written.
    """
    name = f"{datetime.now():%Y%m%d-%H%M%S-%f}-{uuid.uuid4().hex[:4]}"
    return make_folder(out / SWEEPS / name)


def write_cells(
    path: Path, cells: Sequence[tuple[SweepCell, str]], executor: str, cluster: str = ""
) -> None:
    """Write cells.json: every cell of the sweep and its state now, also those that need no job.

    A state is that of the cell, or `active`: an earlier job of the cell is on its way. Choices
    that could not be understood are forgotten once they were mended (`_forget_mended`).

    Raises:
        InputError: the file cannot be written.
    """
    out = path.parent.parent
    _forget_mended(out, {cell.folder for cell, _ in cells})
    listed = [
        {
            "n": n,
            "folder": os.path.relpath(Path(cell.out) / cell.folder, out),
            "key": cell.key,
            "command": cell.command,
            "state": state,
        }
        for n, (cell, state) in enumerate(cells)
    ]
    write_json(
        path / "cells.json",
        {
            "executor": executor,
            "cluster": cluster,
            "process": this_process(),
            "cells": listed,
        },
    )


def write_jobs(path: Path, jobs: Mapping[int, str]) -> None:
    """Write jobs.json."""
    write_json(path / "jobs.json", {str(n): job for n, job in jobs.items()})


def snapshot(path: Path, conf: Path, revision: str | None) -> Path:
    """Copy the package and conf/ to code/, and return it: what PYTHONPATH of a job names.

    Raises:
        InputError: the copy cannot be written.
    """
    code = path / "code"
    package = Path(rerail.__file__).parent
    skipped = shutil.ignore_patterns("__pycache__", "*.tmp", "conf")
    with refusals(code):
        try:
            shutil.copytree(package, code / "rerail", ignore=skipped)
            shutil.copytree(conf, code / "rerail" / "conf")
        except shutil.Error as error:  # one line a file that could not be copied
            raise InputError(f"{code} cannot be written ({error.args[0][0][-1]})") from error
        (code / "rerail" / REVISION).write_text(f"{revision or ''}\n", encoding="utf-8")
    return code


def is_refused(folder: str) -> bool:
    """Return whether a cell of a sweep is one whose choices could not be understood."""
    return _REFUSED.fullmatch(folder) is not None


def _forget_mended(out: Path, folders: set[str]) -> None:
    """Remove the rows of refused choices that a new sweep of these cells takes the place of.

    They are those of earlier sweeps that shared a cell with the new one, or in which nothing could
    run: the grid was typed again. An unrelated sweep leaves them, and so does one with the same
    choices. Only what a refusal leaves is removed: a folder with one row that says so.
    """
    for sweep in sweeps_of(out, []):
        names = {str(cell["folder"]) for cell in sweep.cells}
        refused = {name for name in names if is_refused(name)}
        if names - refused and not names & folders:
            continue
        for name in refused - folders:
            with contextlib.suppress(InputError, OSError):
                if [row["status"] for row in rows_of(out / name / RESULT)] == ["failed"]:
                    (out / name / RESULT).unlink()
                    (out / name).rmdir()


def sweeps_of(out: Path, notes: list[str]) -> Iterator[Sweep]:
    """Yield the sweeps below OUT, oldest first; what cannot be read is noted and left alone."""
    for path in sorted((out / SWEEPS).glob("*/")):
        file = path / "cells.json"
        if not os.path.lexists(file):
            continue  # a sweep that is being described, or was stopped then
        try:
            yield _sweep(path, read_mapping(file))
        except InputError as error:
            notes.append(str(error))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            notes.append(f"{file} is not of this version ({error!r}); it is left as it is")


def _sweep(path: Path, content: Mapping[str, Any]) -> Sweep:
    """Return a sweep from its files.

    Raises:
        InputError: jobs.json cannot be read.
        KeyError, TypeError, ValueError, OverflowError: it is not what this version writes.
    """
    jobs = read_mapping(path / "jobs.json") if os.path.lexists(path / "jobs.json") else {}
    # a job's id is a word on the command line of Slurm
    if wrong := [job for job in jobs.values() if not (isinstance(job, str) and JOB.match(job))]:
        raise ValueError(f"{wrong[0]!r} is no job of Slurm")
    cells = [
        {**cell, "n": int(cell["n"]), "folder": str(cell["folder"])} for cell in content["cells"]
    ]
    for cell in cells:
        if not cell["folder"] or "\0" in cell["folder"]:
            raise ValueError(f"{cell['folder']!r} is no folder")
    names = str(content["executor"]), str(content["cluster"])
    return Sweep(path, cells, dict(content["process"]), jobs, *names)


def read_mapping(file: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        InputError: the file is damaged, foreign or cannot be read.
    """
    try:
        content = read_json(file)
    except InputError as error:
        raise InputError(f"{error}; it is left as it is") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object; it is left as it is")
    return content
