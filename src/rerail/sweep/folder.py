"""OUT/sweeps/<id>/: what was asked for, with which code, and as which jobs."""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import rerail
from rerail.errors import InputError
from rerail.files import write_json
from rerail.processes import this_process
from rerail.run.task import SweepCell

log = logging.getLogger(__name__)

SWEEPS = "sweeps"
REVISION = "revision.txt"


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
    """Make and return OUT/sweeps/<id>; ids sort by time."""
    name = f"{datetime.now():%Y%m%d-%H%M%S-%f}-{uuid.uuid4().hex[:4]}"
    path = out / SWEEPS / name
    path.mkdir(parents=True)
    return path


def write_cells(
    path: Path, cells: Sequence[tuple[SweepCell, str]], executor: str, cluster: str = ""
) -> None:
    """Write cells.json: every cell of the sweep and its state now, also those that need no job.

    A state is that of the cell, or `active`: an earlier job of the cell is on its way.
    """
    out = path.parent.parent
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
    """Copy the package and conf/ to code/, and return it: what PYTHONPATH of a job names."""
    code = path / "code"
    package = Path(rerail.__file__).parent
    skipped = shutil.ignore_patterns("__pycache__", "*.tmp", "conf")
    shutil.copytree(package, code / "rerail", ignore=skipped)
    shutil.copytree(conf, code / "rerail" / "conf")
    (code / "rerail" / REVISION).write_text(f"{revision or ''}\n", encoding="utf-8")
    return code


def sweeps_of(out: Path, notes: list[str]) -> Iterator[Sweep]:
    """Yield the sweeps below OUT, oldest first; what cannot be read is noted and left alone."""
    for path in sorted((out / SWEEPS).glob("*/")):
        file = path / "cells.json"
        if not file.exists():
            continue  # a sweep that is being described, or was stopped then
        try:
            content = read_mapping(file)
            jobs = read_mapping(path / "jobs.json") if (path / "jobs.json").exists() else {}
            cells = [{"n": c["n"], "folder": str(c["folder"]), **c} for c in content["cells"]]
            names = str(content["executor"]), str(content["cluster"])
            yield Sweep(path, cells, dict(content["process"]), jobs, *names)
        except InputError as error:
            notes.append(str(error))
        except (KeyError, TypeError, ValueError) as error:
            notes.append(f"{file} is not of this version ({error!r}); it is left as it is")


def read_mapping(file: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        InputError: the file is damaged, foreign or cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); it is left as it is") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object; it is left as it is")
    return content
