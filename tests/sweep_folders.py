"""Folders of sweeps as they look on disk, for tests that need no model."""

import json
from pathlib import Path
from typing import Any

from rerail.processes import this_process
from rerail.run.results import new_row, write_rows
from rerail.run.task import SweepCell
from rerail.sweep.folder import new_sweep, write_cells, write_jobs

GONE = {**this_process(), "started": 1.0}
ELSEWHERE = {**this_process(), "host": "elsewhere"}


def cell(out: Path, name: str, state: str = "open", reason: str = "") -> SweepCell:
    return SweepCell(str(out), name, f"key-{name}", f"rerail {name}", state=state, reason=reason)


def sweep(out: Path, names: list[str], jobs: dict[int, str] | None = None, **changed: Any) -> Path:
    """Write a sweep: in this process, or as jobs."""
    path = new_sweep(out)
    cells = [(cell(out, name), "open") for name in names]
    write_cells(path, cells, "here" if jobs is None else "slurm")
    if jobs is not None:
        write_jobs(path, jobs)
    content = json.loads((path / "cells.json").read_text())
    (path / "cells.json").write_text(json.dumps({**content, **changed}))
    return path


def status(out: Path, name: str, state: str, **more: Any) -> None:
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "state": state,
        "stage": "",
        "reason": "",
        "time": 1.0,
        "job": None,
        "progress": None,
    }
    (folder / "status.json").write_text(json.dumps({**content, **this_process(), **more}))


def result(out: Path, name: str, state: str = "done", reason: str | None = None) -> None:
    write_rows(out / name, [new_row(key=f"key-{name}", status=state, reason=reason)])
