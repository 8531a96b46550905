"""A private two-node Slurm for tests: the fixture `cluster`, skipped with a reason elsewhere."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCAL = ROOT / "slurm" / "local"
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def load_daemons():
    spec = importlib.util.spec_from_file_location("daemons", LOCAL / "daemons.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Cluster:
    """One running cluster; `env` is the environment in which sbatch and submitit reach it."""

    home: Path
    env: dict[str, str]

    @classmethod
    def at(cls, home: Path, port: int) -> "Cluster":
        """Name a cluster without starting it."""
        env = {
            **os.environ,
            "RERAIL_SLURM": str(home),
            "RERAIL_SLURM_PORT": str(port),
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
            "SLURM_CONF": str(home / "slurm.conf"),
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        }
        return cls(home, env)

    def run(self, *command: str, **options) -> str:
        """Run a command against this cluster; its stdout, or an error that shows its stderr."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, check=False, **options
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str, *options: str) -> str:
        """Submit the lines of a bash script; the job's id."""
        out = self.home / "%A_%a.out" if any("--array" in o for o in options) else "%j.out"
        return self.run(
            *("sbatch", "--parsable", f"--output={self.home / out}", "--open-mode=append"),
            *(*options, f"--wrap={script}"),
        )

    def output(self, job: str) -> str:
        path = self.home / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def states(self, job: str) -> dict[str, str]:
        """Ask as submitit does: the state of each element of a job, the first word of it."""
        text = self.run("sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", job)
        rows = [line.split("|") for line in text.splitlines()[1:]]
        return {name: state.split()[0] for name, state, _ in rows}

    def state(self, job: str) -> str:
        return self.states(job)[job]

    def nodes(self) -> dict[str, str]:
        rows = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t").splitlines()
        return dict(row.split() for row in rows)

    def cancel(self, *jobs: str) -> None:
        self.run("scancel", *jobs)

    def clear(self) -> None:
        """Cancel whatever is left and bring lost nodes back, so that tests do not meet."""
        self.run("scancel", "--user=root", "--state=PENDING")
        self.run("scancel", "--user=root", "--signal=KILL")
        self.up()

    def up(self) -> None:
        """Start what is missing and wait until no job runs and both nodes are idle."""
        self.run(sys.executable, str(LOCAL / "up"))
        self.wait_for(lambda: set(self.nodes().values()) == {"idle"}, 60, "both nodes idle")

    def kill_node(self, name: str, noticed: bool = False) -> None:
        """End a node as a power cut would: its daemon and all that its jobs run.

        The controller finds out by itself after half a minute, or is told at once.
        """
        daemons = load_daemons()
        for pid in daemons.pids(self.home, name) + daemons.job_processes(self.home, name):
            daemons.kill(pid, 9)
        if noticed:
            self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=lost")

    @staticmethod
    def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not after {seconds} s"
            time.sleep(0.2)

    def wait_until(self, job: str, *states: str, seconds: float = 60) -> str:
        """Wait until a job is in one of these states (default: finished); the state."""
        wanted = states or FINISHED
        self.wait_for(
            lambda: set(self.states(job).values()) <= set(wanted) and bool(self.states(job)),
            seconds,
            f"job {job} {' or '.join(wanted)}",
        )
        return next(iter(self.states(job).values()))


def why_not() -> str | None:
    daemons = load_daemons()
    missing = [name for name in daemons.BINARIES if daemons.find(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)})"
    return None if os.geteuid() == 0 else "only root can start slurmd"


@pytest.fixture(scope="session")
def slurm_session(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    # each worker of pytest-xdist has a cluster of its own, in ports of its own
    number = 0 if worker_id == "master" else int(worker_id.removeprefix("gw"))
    started = Cluster.at(tmp_path_factory.mktemp("slurm"), 18000 + 1000 * number)
    try:
        started.up()
        yield started
    finally:
        started.run(sys.executable, str(LOCAL / "down"))


@pytest.fixture
def cluster(slurm_session: Cluster) -> Iterator[Cluster]:
    """A running cluster that no other test uses, and that is empty again afterwards."""
    yield slurm_session
    slurm_session.clear()
