"""How the cells below OUT stand, from their status files, their rows and what Slurm says."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rerail.errors import InputError
from rerail.files import is_folder
from rerail.printable import printable
from rerail.processes import is_on_this_host, running_process
from rerail.run.results import RESULT, rows_of
from rerail.sweep import queue
from rerail.sweep.folder import JOB, SWEEPS, Sweep, is_refused, read_mapping, sweeps_of

OPEN = ("pending", "running")
GOOD = ("done", "not_applicable")
STATUS = "status.json"
_LATEST = 10**11  # seconds since 1970; what is later is no time
STATES = ("pending", "running", "done", "not_applicable", "failed", "lost", "unreadable")


class CellState(NamedTuple):
    """How a cell stands.

    Attributes:
        folder: below OUT.
        state: one of `STATES`. Lost: it says that it runs, but its process or job is gone, or its
            sweep ended before it began. Unreadable: it ended, but its rows are of another version.
        detail: stage and progress, or the reason.
        job: its Slurm job, or nothing.
        seconds: since it began, ended or was last heard of; None where nothing is known.
    """

    folder: str
    state: str
    detail: str = ""
    job: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class View:
    """What was found below OUT: the cells, and sentences about what could not be read."""

    cells: Sequence[CellState]
    notes: Sequence[str] = field(default_factory=list)

    def of(self, folders: Sequence[str]) -> "View":
        """Return the view of these cells alone."""
        wanted = set(folders)
        return View([cell for cell in self.cells if cell.folder in wanted], self.notes)

    @property
    def open(self) -> bool:
        """Whether something is still to come."""
        return any(cell.state in OPEN for cell in self.cells)

    @property
    def exit_code(self) -> int:
        """0: all done; 3: something is pending or running; 1: something failed or was lost."""
        if self.open:
            return 3
        return 0 if all(cell.state in GOOD for cell in self.cells) else 1


class _Asked(NamedTuple):
    """The newest sweep that a cell belongs to, and its job there."""

    sweep: Sweep
    job: str


class _Known(NamedTuple):
    """All that is known of a cell before its state is.

    Attributes:
        status: its status file.
        settled: how it ended, by its rows and status; nothing while it has not.
        asked: the sweep and job that it belongs to.
        job: of that sweep, or the one that its status names.
        queued: Slurm's state of the job, empty where Slurm knows none; None: no answer.
    """

    status: Mapping[str, Any]
    settled: str
    asked: _Asked | None
    job: str
    queued: str | None = ""

    @property
    def cluster(self) -> str:
        return self.asked.sweep.cluster if self.asked else ""


def look(out: Path) -> View:
    """Look at every cell of every sweep below OUT, and at cells that no sweep lists.

    Files that are damaged, foreign or of another version are noted and left alone.

    Raises:
        InputError: OUT does not exist, or cannot be read.
    """
    if not is_folder(out):
        raise InputError(f"{out} does not exist; give the folder that a sweep was started with")
    if not os.access(out, os.R_OK | os.X_OK):
        raise InputError(f"{out} cannot be read (permission denied); ask its owner")
    notes: list[str] = []
    asked: dict[str, _Asked] = {}
    for sweep in sweeps_of(out, notes):
        for entry in sweep.cells:
            if is_refused(entry["folder"]) and not os.path.lexists(out / entry["folder"]):
                continue  # a later sweep has the choices as they were meant
            job = sweep.jobs.get(str(entry["n"]), "")
            if job or entry["folder"] not in asked or entry.get("state") == "open":
                asked[entry["folder"]] = _Asked(sweep, job)
    folders = [*asked, *(name for name in _cell_folders(out) if name not in asked)]
    known = {name: _known(out / name, asked.get(name), notes) for name in folders}
    states = _job_states([k for k in known.values() if k.job and k.settled != "done"])
    cells = []
    for name, cell in known.items():
        answers = states.get(cell.cluster, {})
        queued = None if answers is None else answers.get(cell.job, "")
        cells.append(_cell(name, cell._replace(queued=queued)))
    return View(cells, [str(printable(note)) for note in notes])


def _known(folder: Path, asked: _Asked | None, notes: list[str]) -> _Known:
    status = status_of(folder, notes)
    itself = status.get("job")
    known = isinstance(itself, str) and JOB.match(itself)  # else it is no word for Slurm
    job = asked.job if asked and asked.job else str(itself if known else "")
    return _Known(status, _settled(folder, status, notes), asked, job)


def _job_states(known: Sequence[_Known]) -> Mapping[str, Mapping[str, str] | None]:
    """Ask each cluster once for the states of its jobs."""
    jobs: dict[str, set[str]] = {}
    for entry in known:
        jobs.setdefault(entry.cluster, set()).add(entry.job)
    found_there: dict[str, Mapping[str, str] | None] = {}
    for cluster, ids in jobs.items():
        states = queue.active(ids, cluster)
        if states is not None:
            states = {**queue.ended(ids - states.keys(), cluster), **states}
        found_there[cluster] = states
    return found_there


def _cell_folders(out: Path) -> list[str]:
    return sorted(
        path.name
        for path in out.iterdir()
        if not path.name.startswith(".")
        and path.name != SWEEPS
        and any(os.path.lexists(path / name) for name in (STATUS, RESULT))
    )


def status_of(folder: Path, notes: list[str] | None = None) -> Mapping[str, Any]:
    """Return a cell's status file; empty where there is none or it is foreign, which is noted."""
    path = folder / STATUS
    notes = [] if notes is None else notes
    if not os.path.lexists(path):
        return {}
    try:
        content = read_mapping(path)
    except InputError as error:
        notes.append(str(error))
        return {}
    if not isinstance(content.get("state"), str):
        notes.append(f"{path} has no state; it is left as it is")
        return {}
    return content


def _settled(folder: Path, status: Mapping[str, Any], notes: list[str]) -> str:
    """Return how the cell ended as its rows and status say, or nothing while it has not."""
    path = folder / RESULT
    state = str(status.get("state", ""))
    if os.path.lexists(path):
        try:
            ends = {row.status for row in rows_of(path)}
        except InputError as error:
            notes.append(str(error))
            return "" if state == "running" else "unreadable"
        if ends == {"done"}:
            return "done"  # whatever a second process on the same cell says of itself
        if state != "running" and len(ends) == 1:
            return ends.pop()
    return state if state in ("failed", "not_applicable") else ""


def _cell(name: str, known: _Known) -> CellState:
    detail = _stage(known.status)
    if known.settled == "done":
        state, detail = "done", ""
    elif known.job and known.queued in queue.WAITING:
        state, detail = "pending", f"goes on after {detail}" if detail else ""
    elif known.job and known.queued in queue.WORKING:
        state, detail = "running", detail or "starting"
    elif known.settled:
        state, detail = known.settled, str(known.status.get("reason", ""))
    elif known.status.get("state") == "running":
        state, detail = _running(known, detail)
    else:
        state, detail = _unheard(known)
    seconds = _since(known.status.get("time"))
    return CellState(name, state, str(printable(detail)), known.job, seconds)


def _since(heard: Any) -> float | None:
    """Return the seconds since a time; None where it is no time at all."""
    known = type(heard) in (int, float) and abs(heard) < _LATEST  # NaN is not
    return time.time() - heard if known else None


def _running(known: _Known, detail: str) -> tuple[str, str]:
    """Return the state of a cell whose status says that it runs, and that Slurm does not run."""
    here = is_on_this_host(known.status)
    if running_process(known.status):
        return "running", detail
    if not here and (known.queued is None or not known.job):
        return "running", f"{detail} (on {known.status.get('host')}, which is not asked)"
    gone = f"its job is {known.queued}" if known.queued else "its process is gone"
    return "lost", f"{gone}; it was at {detail}"


def _unheard(known: _Known) -> tuple[str, str]:
    """Return the state of a cell that no process has begun."""
    if known.asked is None:
        return "unreadable", "neither status nor rows can be read"
    sweep = known.asked.sweep
    if known.job:
        if known.queued is None:
            return "pending", "Slurm does not answer here"
        return "lost", f"its job is {known.queued or 'gone'}; see {sweep.log_of(known.job)}"
    if running_process(sweep.process) or not is_on_this_host(sweep.process):
        return "pending", ""
    return "lost", "its sweep ended before it began"


def _stage(status: Mapping[str, Any]) -> str:
    if status.get("state") != "running":
        return ""
    stage = str(status.get("stage", ""))
    progress = status.get("progress")
    if isinstance(progress, Mapping):
        stage += f", {progress.get('label')}: {progress.get('done')} of {progress.get('of')}"
    return stage
