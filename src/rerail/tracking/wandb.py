"""Cells streamed to Weights & Biases: one run a cell, offline where there is no key.

Nobody needs an account: report.html beside the results shows the same and more. Without a key each
cell leaves one run below its own folder; who gets an account later sends them by

    wandb login
    wandb sync OUT/*/wandb/offline-run-*
"""

import contextlib
import functools
import logging
import netrc
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rerail.config.secrets import without_secrets
from rerail.errors import InputError
from rerail.files import make_folder
from rerail.run.mirror import Live
from rerail.run.results import SCALARS, STAGES, Row
from rerail.tracking.journal import Journal
from rerail.tracking.records import flat, of_layer, point_record, records, scalars

log = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds that a server may take to answer
FAREWELL = 300.0  # seconds that the last records may take to arrive

_offline: list[str] = []  # why every run of this process stays offline, once one does


@dataclass(frozen=True)
class WandbMirror:
    """Streams each cell to a run: config, training curve, stage rows and routing as they come.

    A cell that is started again goes on in the run of the same id, its key: the record with number
    n is step n in W&B, whoever sends it. Online, what the server has is not sent again. Offline,
    the run is written anew from the journal, wandb/records.jsonl, and replaces the unfinished one,
    so that there is one run folder a cell. result.json stays the truth: a mirror that fails warns
    and loses nothing.

    Attributes:
        project, entity: where the runs go.
        claim: by which runs are grouped; None takes the one of `+experiments=<claim>`.
        mode: online, offline or disabled; None follows `WANDB_MODE`, and else is online exactly
            when a key is known.
        base_url: the server; None follows `WANDB_BASE_URL`, wandb's settings file or its default.
    """

    project: str = "rerail"
    entity: str | None = None
    claim: str | None = None
    mode: str | None = None
    base_url: str | None = None

    def open(self, key: str, claim: str | None, config: Mapping[str, Any], folder: Path) -> Live:
        """Begin a cell or go on with it; a cell that was shown to its end is left alone."""
        try:
            journal = Journal(Path(folder) / "wandb" / "records.jsonl")
        except InputError as error:
            log.warning("W&B has no copy of %s (%s); nothing else is lost", folder, error)
            return Live()
        if journal.closed or (self.mode or os.environ.get("WANDB_MODE")) == "disabled":
            return Live()
        stream = _Stream(self, key, Path(folder), journal)
        stream.begin(self.claim or claim, config)
        return stream


def _shielded(method: Callable[..., None]) -> Callable[..., None]:
    """Make a failure of the client a warning, after which this run is left alone."""

    @functools.wraps(method)
    def shielded(self: "_Stream", *args: Any, **named: Any) -> None:
        if self.lost:
            return
        try:
            method(self, *args, **named)
        except Exception as error:  # whatever the client raises, the rows are safe
            self.lost = True
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            log.warning("W&B has no full copy of %s (%s); nothing else is lost", self.folder, why)

    return shielded


class _Stream(Live):
    """The run of one cell."""

    def __init__(self, mirror: WandbMirror, key: str, folder: Path, journal: Journal):
        self.mirror, self.key, self.folder, self.journal = mirror, key, folder, journal
        self.lost = False
        self.run: Any = None

    @_shielded
    def begin(self, claim: str | None, config: Mapping[str, Any]) -> None:
        """Begin, and send what the journal holds and the server lacks."""
        names = (config.get("choices") or {}).get("names") or {}
        make_folder(self.folder)
        self.run = _init(
            self.mirror,
            group=claim,
            job_type=names.get("compressor"),
            name=self.folder.name,
            id=self.key,
            dir=str(self.folder),
            config=without_secrets({"claim": claim, **config}),
        )
        self._forget()
        # what the columns are plotted over
        self.run.define_metric("repair/*", step_metric="repair/step")
        for layers in (f"{stage}/layers" for stage in STAGES):
            self.run.define_metric(f"{layers}/*", step_metric=f"{layers}/layer", summary="none")
        sent = self.run.step
        for step, record in enumerate(self.journal.records.values()):
            if step >= sent:
                self.run.log(record, step=step, commit=True)

    def _forget(self) -> None:
        """Remove what earlier processes left of this run and nobody sent: the journal holds it."""
        for folder in (self.folder / "wandb").glob(f"*run-*-{self.key}"):
            if folder != Path(self.run.dir).parent and not list(folder.glob("*.synced")):
                shutil.rmtree(folder)

    def _send(self, name: str, record: Mapping[str, Any]) -> None:
        if name not in self.journal.records:
            record = without_secrets(record)
            self.run.log(record, step=len(self.journal.records), commit=True)
            self.journal.add(name, record)

    @_shielded
    def point(self, point: Mapping[str, float]) -> None:
        """Send a point of the repair."""
        self._send(*point_record(point))

    @_shielded
    def row(self, row: Row) -> None:
        """Send the records of a row; the first also brings what runs are grouped and sorted by."""
        if not any(name in self.journal.records for name in ("teacher", "cell")):
            self.run.config.update(without_secrets(flat(row)), allow_val_change=True)
        for name, record in records(row):
            self._send(name, record)

    @_shielded
    def close(self, status: str, rows: Sequence[Row] = (), reason: str = "") -> None:
        """End the run; what became of the rows after they were sent comes first."""
        for row in rows:
            sent = self.journal.records.get(row["stage"], {})
            if changed := {n: value for n, value in scalars(row).items() if sent.get(n) != value}:
                self._send(f"{row['stage']}/end", changed)
        ending = {"status": status, **({"reason": reason} if reason else {})}
        self.run.summary.update(without_secrets(ending))
        if rows and not self.run.offline:  # offline there are no artifacts
            self.run.log_artifact(artifact(self.key, rows, self.folder))
        self.run.finish(exit_code=0 if status == "done" else 1)
        if status == "done":
            self.journal.close()


def _init(mirror: WandbMirror, **options: Any) -> Any:
    """Return a run; offline where the server does not answer or does not know the key."""
    import wandb

    settings = wandb.Settings(  # our rows say what ran where; nothing else leaves the machine
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        init_timeout=PATIENCE,
        finish_timeout=FAREWELL,
        finish_timeout_raises=True,
    )
    settings.base_url = mirror.base_url or server()
    options |= {"project": mirror.project, "entity": mirror.entity, "settings": settings}
    begin = functools.partial(wandb.init, resume="allow", reinit="finish_previous", **options)
    mode = mode_of(mirror.mode, str(settings.base_url))
    try:
        return begin(mode=mode)
    except wandb.Error as error:
        if mode != "online":
            raise
        _stay_offline(f"{settings.base_url} cannot be used ({' '.join(str(error).split())})")
        wandb.teardown()  # the client still holds the id of the run that did not begin
        return begin(mode="offline")


def mode_of(mode: str | None, base_url: str) -> Any:
    """Return the mode, and warn once when it is offline for want of a key."""
    if _offline:
        return "offline"
    if mode or os.environ.get("WANDB_MODE"):
        return mode
    if has_key(base_url):
        return "online"
    _stay_offline("no key is known")
    return "offline"


def _stay_offline(why: str) -> None:
    _offline.append(why)
    log.warning("W&B: %s, so runs stay offline; send them by `wandb sync` later", why)


def server() -> str:
    """Return the address of the server: `WANDB_BASE_URL`, wandb's settings file or its default."""
    import wandb

    return os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)


def has_key(base_url: str) -> bool:
    """Return whether a key of this server is known."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc(os.environ.get("NETRC") or str(Path.home() / ".netrc"))
        return urlparse(base_url).hostname in known.hosts
    return False


def artifact(key: str, rows: Sequence[Row], folder: Path) -> Any:
    """Return the tables of a cell (rows, layers, continuations), its rows and its plan."""
    import wandb

    made = wandb.Artifact(f"cell-{key}", type="cell")
    for name in ("result.json", "plan.json"):
        if (folder / name).exists():
            made.add_file(str(folder / name))
    tables: dict[str, list[Mapping[str, Any]]] = {
        "rows": [{name: row[name] for name in SCALARS} for row in rows],
        "layers": [
            {"stage": row["stage"], **of_layer(layer)}
            for row in rows
            for layer in row["layers"] or ()
        ],
        "continuations": [
            {"stage": r["stage"], "prompt": r["prompt"], "continuation": r["samples_text"]}
            for r in rows
            if r["samples_text"]
        ],
    }
    for name, entries in tables.items():
        columns: Any = list(dict.fromkeys(column for entry in entries for column in entry))
        data = [[entry.get(column) for column in columns] for entry in entries]
        if data:
            made.add(wandb.Table(columns=columns, data=without_secrets(data)), name)
    return made
