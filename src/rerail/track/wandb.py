"""Rows mirrored to Weights & Biases: one run a cell, offline where there is no key."""

import contextlib
import logging
import netrc
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rerail.track.results import COLUMNS, Row

log = logging.getLogger(__name__)

_SECRET = re.compile(r"secret|passw|credential|api_?key|access_?key|(^|_)token$", re.I)
_SCALARS = [name for name, column in COLUMNS.items() if column.kind not in (dict, list)]
_said: set[str] = set()


@dataclass(frozen=True)
class WandbMirror:
    """Logs each cell as a run: its config, training curve, stage rows and routing, in this order.

    Each stage is one record `<stage>/<column>`, each layer one of `<stage>/layers/<column>`, each
    point of the curve one of `repair/<column>`. result.json stays the truth: a mirror that fails
    warns and loses nothing.

    Attributes:
        project, entity: where the runs go.
        claim: the experiment that the runs belong to; runs are grouped by claim and model.
        mode: online, offline or disabled; None follows `WANDB_MODE`, and else is online exactly
            when a key is known.
        base_url: the server; None follows `WANDB_BASE_URL`, and else is wandb's own default.
    """

    project: str = "rerail"
    entity: str | None = None
    claim: str | None = None
    mode: str | None = None
    base_url: str | None = None

    def log_rows(self, rows: Sequence[Row], config: Mapping[str, Any], folder: Path) -> None:
        """Mirror the rows of one cell; offline runs lie in `folder`/wandb, for `wandb sync`."""
        if not rows:
            return
        try:
            self._log(rows, config, Path(folder))
        except Exception as error:  # whatever the client raises, the rows are safe already
            log.warning("W&B has no copy of %s (%s: %s)", folder, type(error).__name__, error)

    def _log(self, rows: Sequence[Row], config: Mapping[str, Any], folder: Path) -> None:
        import wandb

        head = rows[0]
        settings = wandb.Settings(  # our rows say what ran where; nothing else leaves the machine
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        settings.base_url = self.base_url or settings.base_url
        with wandb.init(
            project=self.project,
            entity=self.entity,
            group="/".join(name for name in (self.claim, head["model"]) if name) or None,
            job_type=head["compressor"],
            name=folder.name,
            id=head["key"],
            resume="allow",
            reinit="finish_previous",
            mode=self._mode(str(settings.base_url)),
            dir=str(folder),
            config={**without_secrets(config), "revision": head["revision"]},
            settings=settings,
        ) as run:
            for step, record in enumerate(records(rows)):
                run.log(without_secrets(record), step=step)
            run.summary.update(summary(rows))
            if not run.offline and not run.disabled:  # offline there are no artifacts
                _upload(run, head["key"], folder)

    def _mode(self, base_url: str) -> Any:
        """Return the mode, and say once when it is offline for want of a key."""
        if self.mode or os.environ.get("WANDB_MODE"):
            return self.mode
        if _has_key(base_url):
            return "online"
        if "offline" not in _said:
            _said.add("offline")
            log.warning(
                "W&B: no key is known, so runs stay offline; send them by `wandb sync` later"
            )
        return "offline"


def records(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield what is logged, record by record: curve points, then stages with their layers."""
    for row in rows:
        for point in row["curve"] or []:
            yield {f"repair/{name}": value for name, value in point.items() if value is not None}
    for row in rows:
        stage = row["stage"] or "cell"
        yield {f"{stage}/{name}": row[name] for name in _SCALARS if row[name] is not None}
        for layer in row["layers"] or []:
            yield {f"{stage}/layers/{name}": value for name, value in layer.items()}
        for one in row["tasks"] or []:
            name = f"{stage}/tasks/{one['task']}/{one['metric']}"
            yield {name: one["value"], f"{name}_se": one["se"], f"{name}_n": one["n"]}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the columns that tables of runs are sorted by, each of the last stage that has it."""
    names = ("granularity", "paradigm", "recovery", "recovery_se", "nll", "kl", "bytes", "status")
    return {name: row[name] for row in rows for name in names if row[name] is not None}


def without_secrets(value: Any, name: str = "") -> Any:
    """Return a value with secrets hidden: all of a telling name, and known ones anywhere."""
    if isinstance(value, Mapping):
        return {str(key): without_secrets(one, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(one, name) for one in value]
    if not isinstance(value, str):
        return value
    if _SECRET.search(name):
        return "(hidden)"
    for known in (v for k, v in os.environ.items() if _SECRET.search(k) and len(v) > 7):
        value = value.replace(known, "(hidden)")
    return value


def _has_key(base_url: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        found = netrc.netrc(os.environ.get("NETRC") or str(Path.home() / ".netrc"))
        return urlparse(base_url).hostname in found.hosts
    return False


def _upload(run: Any, key: str, folder: Path) -> None:
    """Keep the rows and the plan as an artifact of the run."""
    import wandb

    artifact = wandb.Artifact(f"cell-{key}", type="cell")
    for name in ("result.json", "plan.json"):
        if (folder / name).exists():
            artifact.add_file(str(folder / name))
    run.log_artifact(artifact)
