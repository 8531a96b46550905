"""Start, find and stop the daemons of one local cluster, which lives in one folder."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from string import Template

HERE = Path(__file__).parent
DEBIAN = "apt-get install -y --no-install-recommends"
PACKAGES = "slurm-wlm slurm-wlm-basic-plugins slurmctld slurmd slurm-client munge"
NODES = ("n1", "n2")
BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "scancel")
SECONDS = 60


def folder() -> Path:
    """Return where the cluster lives: `RERAIL_SLURM`, or outputs/slurm of the checkout."""
    given = os.environ.get("RERAIL_SLURM")
    return Path(given or HERE.parents[1] / "outputs" / "slurm").resolve()


def refuse_early(home: Path) -> None:
    """Say in one sentence what is missing, before anything starts."""
    missing = [name for name in BINARIES if find(name) is None]
    if missing:
        sys.exit(f"slurm/local: {', '.join(missing)} not found; on Debian: {DEBIAN} {PACKAGES}")
    if os.geteuid() != 0:
        sys.exit("slurm/local: only root can start slurmd; run it in a container or with sudo")
    # a socket's address holds 108 bytes
    if len(str(home / "munge" / "socket")) > 100:
        sys.exit(f"slurm/local: {home} is too long for a socket; set RERAIL_SLURM to a short path")


def find(name: str) -> str | None:
    """Return the machine's own program, not the one of a cluster that PATH may name first."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin".split(":")
    return shutil.which(name, path=":".join(p for p in path if not is_ours(Path(p))))


def is_ours(path: Path) -> bool:
    """Return whether this is the bin/ of a local cluster."""
    return path.name == "bin" and (path.parent / "gres.conf").exists()


def environment(home: Path) -> dict[str, str]:
    """What a shell needs so that sbatch, sacct and submitit talk to this cluster."""
    path = os.environ.get("PATH", "").split(":")
    ours = [str(home / "bin"), *(p for p in path if p != str(home / "bin"))]
    return {"SLURM_CONF": str(home / "slurm.conf"), "PATH": ":".join(ours)}


def configure(home: Path) -> None:
    """Write the configuration; kept from an earlier `up`, since running daemons know it."""
    for name in ("munge", "state", "spool", "log", "bin", "submitted"):
        (home / name).mkdir(parents=True, exist_ok=True)
    home.chmod(0o755)
    (home / "munge").chmod(0o755)
    port = free_ports()
    values = {
        "folder": str(home),
        "host": socket.gethostname().split(".")[0],
        "port": str(port),
        "port1": str(port + 1),
        "port2": str(port + 2),
        "first_job": str(port - 16999),
    }
    for name in ("gres.conf", "slurm.conf"):
        text = Template((HERE / name).read_text()).substitute(values)
        (home / name).write_text(text)
    key = home / "munge" / "key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
    for index in (0, 1):
        device = home / f"gpu{index}"
        if not device.exists():
            os.mknod(device, 0o600 | 0o020000, os.makedev(1, 3))
    values["sbatch"] = str(find("sbatch"))
    script(home / "bin" / "sbatch", Template((HERE / "sbatch").read_text()).substitute(values))
    script(home / "bin" / "prolog", "#!/bin/sh\necho export MASTER_ADDR=127.0.0.1\n")
    body = (HERE / "sacct").read_text().partition("\n")[2]
    script(home / "bin" / "sacct", f"#!{sys.executable}\n{body}")


def script(path: Path, text: str) -> None:
    """Write a program."""
    path.write_text(text)
    path.chmod(0o755)


def free_ports() -> int:
    """Return the first of three ports in a row that nobody listens on, from RERAIL_SLURM_PORT."""
    first = int(os.environ.get("RERAIL_SLURM_PORT", "17000"))
    for port in range(first, first + 1000, 100):
        if all(map(is_free, range(port, port + 3))):
            return port
    sys.exit(f"slurm/local: ports {first} to {first + 1000} are taken; set RERAIL_SLURM_PORT")


def is_free(port: int) -> bool:
    """Return whether nobody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def commands(home: Path) -> dict[str, list[str]]:
    """Each daemon's name (its pid file is NAME.pid) with its command line."""
    munge = home / "munge"
    conf = ["-f", str(home / "slurm.conf")]
    return {
        # --force: a checkout or temporary folder may lie below one that is closed to others
        "munged": [
            "munged",
            "--force",
            f"--key-file={munge / 'key'}",
            f"--socket={munge / 'socket'}",
            f"--pid-file={home / 'munged.pid'}",
            f"--log-file={home / 'log' / 'munged.log'}",
            f"--seed-file={munge / 'seed'}",
        ],
        "slurmctld": ["slurmctld", *conf],
        **{node: ["slurmd", *conf, "-N", node] for node in NODES},
    }


def pids(home: Path, name: str) -> list[int]:
    """Return the processes that are this daemon of this cluster, known by their command line.

    Pid files would do until someone removes the folder, or the machine starts again.
    """
    ours = commands(home)[name][1:]
    return [pid for pid in all_pids() if [w for w in command_line(pid)[1:] if w] == ours]


def all_pids() -> list[int]:
    """Return every process but this one."""
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if int(p.name) != os.getpid()]


def command_line(pid: int) -> list[str]:
    """Return the words a process was started with; one empty word when it has ended."""
    return read_words(Path(f"/proc/{pid}/cmdline"))


def read_words(path: Path) -> list[str]:
    """Read a file of /proc that separates words by null bytes."""
    try:
        return path.read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return [""]


def job_processes(home: Path, node: str | None = None) -> list[int]:
    """Return what jobs of this cluster run, known by the environment that Slurm gave them.

    Their minders come first: one that outlives its job would report it as failed.
    """
    needed = {f"SLURM_CONF={home / 'slurm.conf'}"}
    needed |= {f"SLURMD_NODENAME={node}"} if node else set()
    minders, others = [], []
    for pid in all_pids():
        words = read_words(Path(f"/proc/{pid}/environ"))
        if not needed <= set(words):
            continue
        if command_line(pid)[0].startswith("slurmstepd"):
            minders.append(pid)
        elif any(word.startswith("SLURM_JOB_ID=") for word in words):
            others.append(pid)
    return minders + others


def start(home: Path, name: str) -> None:
    """Start a daemon, which then runs without a terminal."""
    command = commands(home)[name]
    done = subprocess.run(
        [str(find(command[0])), *command[1:]],
        # a daemon outlives the shell and keeps none of its secrets; the minders of jobs inherit
        # the name of their node
        env={**environment(home), "HOME": str(home), "SLURMD_NODENAME": name},
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} did not start: {done.stderr.strip()[-500:]}")


def stop(found: list[int], patience: float = 5.0) -> None:
    """Ask processes to end, then make them."""
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, patience)):
        deadline = time.monotonic() + wait
        for pid in found:
            kill(pid, number)
        while (found := [pid for pid in found if is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)


def kill(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that only waits to be buried does not."""
    return bool(command_line(pid)[0])


def ask(home: Path, *command: str) -> str:
    """Return what a command of Slurm says to this cluster."""
    done = subprocess.run(
        command, env={**os.environ, **environment(home)}, capture_output=True, text=True
    )
    return done.stdout.strip()


def wait_until_idle(home: Path) -> None:
    """Wait until both nodes take jobs."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        states = ask(home, "sinfo", "-h", "-p", "low", "-N", "-o", "%t").split()
        if len(states) == len(NODES) and set(states) <= {"idle", "mix", "alloc"}:
            return
        time.sleep(0.2)
    raise RuntimeError(f"the nodes are {states or 'unknown'} after {SECONDS} s; see {home}/log")
