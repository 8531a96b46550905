"""What Slurm says about jobs: one squeue for those that are not over, one sacct for the others."""

import getpass
import logging
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rerail.errors import InputError

log = logging.getLogger(__name__)

WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
WORKING = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "STOPPED"}
)
_PATIENCE = 30.0  # seconds that a Slurm command may take


def environment(cluster: str) -> dict[str, str] | None:
    """Return the variables by which a cluster is reached: empty, or those of the `local` one.

    None: the local cluster does not run.
    """
    if cluster != "local":
        return {}
    from rerail.sweep.cluster import local_environment

    try:
        return local_environment()
    except InputError as error:
        log.debug("%s", error)
        return None


def active(ids: Iterable[str], cluster: str = "", named: str = "") -> Mapping[str, str] | None:
    """Return the states of those jobs that wait or run; None where Slurm does not answer.

    Args:
        ids: of jobs.
        cluster: empty, or `local`.
        named: the name that they must have, of their sweep; empty for any.
    """
    wanted = set(ids)
    answer = _ask(cluster, "squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T|%j")
    if answer is None:
        return None
    rows = (line.strip().split("|", 2) for line in answer.splitlines() if line.count("|") > 1)
    return {job: state for job, state, name in rows if job in wanted and named in ("", name)}


def ended(ids: Iterable[str], cluster: str = "") -> Mapping[str, str]:
    """Return the last states of jobs, as far as accounting knows: COMPLETED, CANCELLED ..."""
    wanted = set(ids)
    numbers = ",".join(sorted({job.partition("_")[0] for job in wanted}))
    if not wanted:
        return {}
    answer = _ask(cluster, "sacct", "-o", "JobID,State", "--parsable2", "-j", numbers)
    rows = [line.split("|") for line in (answer or "").splitlines()[1:] if line.count("|") == 1]
    return {job: state.split()[0] for job, state in rows if job in wanted and state.split()}


def cancel(ids: Sequence[str], cluster: str = "") -> bool:
    """Cancel jobs; whether Slurm did."""
    return _ask(cluster, "scancel", *ids) is not None


def _ask(cluster: str, *command: str) -> str | None:
    """Return what a command of Slurm prints; None where it fails or is not there."""
    variables = environment(cluster)
    if variables is None:
        return None
    options: dict[str, Any] = {"env": {**os.environ, **variables}, "timeout": _PATIENCE}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("%s: %s", command[0], error)
        return None
    return str(done.stdout)
