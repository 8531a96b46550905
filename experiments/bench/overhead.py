"""From the start of a process to the first step of its cell, against the bare imports."""

import os
import random
import statistics
import subprocess
import sys
import tempfile

from timing import Row, row

IMPORTS = [sys.executable, "-c", "import torch, transformers, lightning"]
CELL = [sys.executable, "-m", "rerail", "model=tiny_fine", "compressor=reap"]
LIMIT = 1.3


def cpu_seconds(command: list[str], until: bytes | None) -> float:
    """Return the CPU seconds of a process, up to a line of its stderr that holds `until`."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if until is not None and until in line:
                process.kill()
                break
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, -9):
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def overhead_rows(rounds: int) -> list[Row]:
    """CPU time on one thread, in turns; the first round warms the disk and is not counted."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for r in range(rounds + 1):
            seconds = {}
            for name in random.Random(r).sample(["imports", "cell"], 2):
                command = IMPORTS if name == "imports" else [*CELL, f"out={folder}/{r}"]
                seconds[name] = cpu_seconds(command, b": text" if name == "cell" else None)
            ratios += [seconds["cell"] / seconds["imports"]] if r else []
    value = statistics.median(ratios)
    return [row("launch: first step of a cell / the bare imports", value, LIMIT)]
