"""Sanity of a Slurm cluster before anything is submitted, and where the local one lives."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rerail.errors import InputError

COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo", "sacct")
# submitit takes every preemption of a job of up to ten minutes for its time limit
SHORTEST_MIN = 11
# Slurm sends the signal before the time limit up to this much earlier than asked
EARLY_S = 60
_PATIENCE_S = 60.0
_ASKED_BY_SUBMITIT = ("sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", "1")


@dataclass(frozen=True)
class Partition:
    """A row of sinfo: equal nodes of one partition.

    `minutes` is its time limit (infinity: none), `nodes` how many there are, `gpus` of each.
    """

    name: str
    default: bool
    minutes: float
    nodes: int
    gpus: int


def check_cluster(
    partition: str | None,
    timeout_min: int,
    signal_delay_s: int = 90,
    gpus_per_node: int | None = None,
    nodes: int | None = None,
) -> None:
    """Check that the cluster of this environment can take such jobs and tell how they end.

    Args:
        partition: its name, several separated by commas, or None for the cluster's default.
        timeout_min: the walltime asked for, in minutes.
        signal_delay_s: how long before its end a job is told to save, in seconds.
        gpus_per_node: asked for by gres.
        nodes: of one job.

    Raises:
        InputError: a command of Slurm is missing, the controller does not answer, sacct does not
            work, there is no such partition, or it does not offer that time or that many GPUs.
    """
    check_walltime(timeout_min, signal_delay_s)
    if missing := [name for name in COMMANDS if shutil.which(name) is None]:
        raise InputError(
            f"{', '.join(missing)} not found: this profile needs a machine that submits to Slurm; "
            "+slurm=local with `make slurm-up` needs none"
        )
    rows = partitions()
    # what submitit itself asks: where sacct fails, it waits for cancelled jobs for ever
    answer = _ask(*_ASKED_BY_SUBMITIT, failing="sacct does not work on this cluster")
    if not answer.startswith("JobID|State|NodeList"):
        raise InputError(f"sacct does not answer as Slurm's does: it says {answer[:80]!r}")
    ours = chosen(rows, partition)
    longest = max(row.minutes for row in ours)
    if timeout_min > longest:
        raise InputError(
            f"hydra.launcher.timeout_min={timeout_min} is more than partition "
            f"{ours[0].name!r} allows; at most {longest:g}"
        )
    check_nodes(ours, gpus_per_node or 0, nodes or 1)


def check_walltime(timeout_min: int, signal_delay_s: int) -> None:
    """Check that a job of this walltime can save: at least half of it must be left for work.

    Raises:
        InputError: it is too short.
    """
    shortest = max(SHORTEST_MIN, -(-2 * (signal_delay_s + EARLY_S) // 60))
    if timeout_min < shortest:
        raise InputError(
            f"hydra.launcher.timeout_min={timeout_min} is too short to checkpoint and resume "
            f"(told to save {signal_delay_s} s before the end); at least {shortest} minutes"
        )


def check_nodes(rows: Sequence[Partition], gpus: int, nodes: int) -> None:
    """Check that enough nodes have enough GPUs.

    Raises:
        InputError: they do not.
    """
    enough = sum(row.nodes for row in rows if row.gpus >= gpus)
    if nodes > enough:
        most = max(row.gpus for row in rows)
        raise InputError(
            f"hydra.launcher asks for nodes={nodes} with gpus_per_node={gpus}, and partition "
            f"{rows[0].name!r} has {enough} such; its {sum(row.nodes for row in rows)} nodes "
            f"have up to {most} GPUs"
        )


def chosen(rows: Sequence[Partition], partition: str | None) -> list[Partition]:
    """Return the rows of the partition asked for.

    Raises:
        InputError: there is none of that name, or no default; those that exist are listed.
    """
    names = {row.name for row in rows}
    wanted = partition.split(",") if partition else [row.name for row in rows if row.default]
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        named = ", ".join(unknown) or "none, and the cluster has no default,"
        raise InputError(
            f"hydra.launcher.partition: {named} does not exist; "
            f"allowed: {', '.join(sorted(names)) or 'nothing, the cluster has no partition'}"
        )
    return [row for row in rows if row.name in wanted]


def partitions() -> list[Partition]:
    """Ask the controller which partitions there are.

    Raises:
        InputError: it does not answer.
    """
    failing = "the Slurm controller does not answer"
    answer = _ask("sinfo", "-h", "-a", "-o", "%P|%l|%D|%G", failing=failing)
    rows = []
    for line in answer.splitlines():
        name, limit, nodes, gres = line.strip().split("|")
        gpus = sum(int(n) for n in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)(?=[,(]|$)", gres))
        default = name.endswith("*")
        rows.append(Partition(name.rstrip("*"), default, minutes(limit), int(nodes), gpus))
    return rows


def minutes(limit: str) -> float:
    """Read a time of Slurm: `infinite`, `minutes:seconds`, `1-00:00:00`."""
    days, _, clock = limit.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts):
        return float("inf")
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return int(days or 0) * 24 * 60 + seconds / 60


def local_environment() -> dict[str, str]:
    """Return the variables by which Slurm's commands reach the cluster of `make slurm-up`.

    It lives in `RERAIL_SLURM`, or in outputs/slurm of the working folder or of the checkout.

    Raises:
        InputError: none is running.
    """
    roots = (Path.cwd(), Path(__file__).parents[3])
    chosen_home = os.environ.get("RERAIL_SLURM")
    homes = [Path(chosen_home)] if chosen_home else [root / "outputs" / "slurm" for root in roots]
    homes = list(dict.fromkeys(home.resolve() for home in homes))
    for home in homes:
        ours = str(home / "bin")
        path = [p for p in os.environ.get("PATH", "").split(":") if p != ours]
        variables = {"SLURM_CONF": str(home / "slurm.conf"), "PATH": ":".join([ours, *path])}
        if (home / "slurm.conf").exists() and _answers(variables):
            return variables
    raise InputError(
        f"no local cluster is running in {' or '.join(map(str, homes))}; "
        "start one with make slurm-up"
    )


def _answers(variables: Mapping[str, str]) -> bool:
    try:
        return " is UP" in _ask("scontrol", "ping", failing="", variables=variables)
    except InputError:
        return False


def _ask(*command: str, failing: str, variables: Mapping[str, str] | None = None) -> str:
    """Return what a command of Slurm prints.

    Args:
        command: its words.
        failing: how the sentence begins where it fails.
        variables: of its environment, beside those of this process.

    Raises:
        InputError: it fails, or does not answer in time.
    """
    environment = {**os.environ, **(variables or {})}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"{failing}: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise InputError(f"{failing}: {lines[-1]}")
    return done.stdout
