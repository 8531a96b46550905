"""Two processes that run one program of `rank_programs` together, as torchrun would start them."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parent


def free_port() -> int:
    """Return a port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def together(program: str, folder: Path, size: int = 2, seconds: float = 180) -> list[Any]:
    """Return what the program gave in each process: `rank_programs.<program>(folder)`.

    Warnings are errors there too. All are ended when one fails or time is up.
    """
    code = f"import rank_programs as r; r.give(r.{program}, {str(folder)!r})"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            mine = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            words = [sys.executable, "-W", "error", "-c", code]
            with (folder / f"{program}-{rank}.log").open("wb") as log:
                running.append(subprocess.Popen(words, env=mine, stdout=log, stderr=log))
        for process in running:
            process.wait(seconds)
    finally:
        for process in running:
            process.kill()
            process.wait()
    logs = [(folder / f"{program}-{rank}.log").read_text()[-4000:] for rank in range(size)]
    assert all(process.returncode == 0 for process in running), "\n".join(logs)
    return [torch.load(folder / f"{program}-{rank}.pt", weights_only=True) for rank in range(size)]


def close(ours, theirs, where="row") -> None:
    """The repaired stage comes from other sums; all before it is equal to the bit."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            close(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, where)
    elif isinstance(theirs, float) and not math.isnan(theirs):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), where
    else:
        assert ours == theirs, where
