"""A sweep as a Slurm job array: what is submitted, and what the terminal shows meanwhile."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rerail.errors import InputError
from rerail.files import make_folder
from rerail.run.provenance import revision
from rerail.run.task import SweepCell
from rerail.sweep import table
from rerail.sweep.cluster import check_cluster, local_environment
from rerail.sweep.folder import new_sweep, snapshot, write_cells, write_jobs
from rerail.sweep.job import Job
from rerail.sweep.states import OPEN, look
from rerail.sweep.submit import submit

log = logging.getLogger(__name__)


def check(slurm: Mapping[str, Any]) -> None:
    """Check what the profile asks for against the cluster, before anything is resolved.

    The local cluster is put into the environment, so that sbatch finds it.

    Raises:
        InputError: no Slurm, no accounting, no such partition, or too little time to save.
    """
    if slurm.get("cluster") == "local":
        os.environ.update(local_environment())
    asked = ("partition", "timeout_min", "signal_delay_s", "gpus_per_node", "nodes")
    check_cluster(**{name: slurm[name] for name in asked})


def launch(
    out: Path, cells: Sequence[SweepCell], slurm: Mapping[str, Any], conf: Path
) -> Sequence[str]:
    """Submit the cells that are neither done nor on their way; the folders of all cells.

    OUT/sweeps/<id>/ keeps the code, each cell's resolved choices, and the job ids. Jobs import and
    read these, so that editing the checkout while they wait changes nothing.

    Raises:
        InputError: the profile cannot be used, or sbatch refuses; nothing was submitted.
    """
    # a cell that an earlier start of the sweep still runs gets no second job
    busy = (
        {cell.folder for cell in look(out).cells if cell.state in OPEN} if out.is_dir() else set()
    )
    path, cluster = new_sweep(out), str(slurm.get("cluster") or "")
    try:
        states = ["active" if c.folder in busy and c.state == "open" else c.state for c in cells]
        write_cells(path, list(zip(cells, states, strict=True)), "slurm", cluster)
        wanted = {n: c for n, (c, s) in enumerate(zip(cells, states, strict=True)) if s == "open"}
        ids: list[str] = []
        if wanted:
            code = snapshot(path, conf, revision())
            make_folder(path / "cells")
            jobs = [Job(c.save(path / "cells" / f"{n}.yaml")) for n, c in wanted.items()]
            ids = submit(jobs, path / "jobs", code, slurm)
            write_jobs(path, dict(zip(wanted, ids, strict=True)))
    except InputError:
        # a sweep without jobs would look lost for ever
        shutil.rmtree(path, ignore_errors=True)
        raise
    _log_counts(out, states, ids)
    return [cell.folder for cell in cells]


def _log_counts(out: Path, states: Sequence[str], ids: Sequence[str]) -> None:
    counts = {
        "done already": states.count("done"),
        "waiting or running from an earlier start": states.count("active"),
        "cannot run": states.count("failed") + states.count("not_applicable"),
    }
    rest = "".join(f", {count} {text}" for text, count in counts.items() if count)
    log.info("%d cells submitted%s", len(ids), rest)
    if ids or states.count("active"):
        log.info("look:   rerail-sweep status --watch %s", out)
        log.info("cancel: rerail-sweep cancel %s", out)


def wait(out: Path, folders: Sequence[str]) -> int:
    """Show the cells until all have ended; the exit code of `rerail-sweep status`.

    The jobs do not need this process: an interrupt ends the waiting and nothing else.
    """
    return table.watch(lambda: look(out).of(folders)).exit_code
