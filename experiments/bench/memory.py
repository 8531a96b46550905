"""Peak memory of one piece of work, each in a fresh process: `memory.py TASK SIZE_AS_JSON`.

The peak is the largest resident memory of the process (VmHWM) less that at the start of the work,
so the interpreter and the libraries do not dilute a ratio. The C library is told to map tensors one
by one (`MALLOC_MMAP_THRESHOLD_`), so what is counted is what is alive, and not what its heap keeps
for later, which varies by a factor from run to run. Linux only.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import Batch, Size, random_model, reap_student, text
from speed import gradient_of, kl_case, step
from timing import Row, row

from rerail.distill.router_distillation import RouterDistillation
from rerail.distill.settings import RouterKD
from rerail.distill.trainable import master_copies
from rerail.moe.model import MoEModel
from rerail.teacher.hidden_states import LiveTeacher


def process_memory(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def resident(student: bool, trained: bool, size: Size) -> Callable[[], None]:
    """A random teacher and one forward; with its REAP student and its forward; with a KD step."""

    def work() -> None:
        teacher = random_model(size)
        batch = text(teacher, size)
        models = [teacher, reap_student(teacher, batch)] if student else [teacher]
        for model in models:
            with torch.no_grad():
                model.model(input_ids=batch[0], use_cache=False)
        if trained:
            one_step(*models, batch)

    return work


def one_step(teacher: MoEModel, student: MoEModel, batch: Batch) -> None:
    with master_copies(student, "router_rows") as rows:
        module = RouterDistillation(student, LiveTeacher(teacher), RouterKD(), rows, 1)
        step(module, torch.optim.AdamW(rows.values()), batch)


def kl(kind: str, size: Size) -> Callable[[], Any]:
    return partial(gradient_of, kind, kl_case(size))


TASKS: dict[str, Callable[[Size], Callable[[], Any]]] = {
    "plain KL": partial(kl, "plain"),
    "chunked KL": partial(kl, "chunked"),
    "teacher": partial(resident, False, False),
    "teacher and student": partial(resident, True, False),
    "teacher, student and a step": partial(resident, True, True),
}


def peak(task: str, size: Size) -> int:
    """Return the peak memory in bytes of a task beyond its inputs; call it in a fresh process."""
    work = TASKS[task](size)
    before = process_memory("VmRSS")
    work()
    return process_memory("VmHWM") - before


def fresh_peak(task: str, size: Size) -> int:
    command = [sys.executable, __file__, task, json.dumps(asdict(size))]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return int(done.stdout)


def memory_rows(size: Size, peak_of: Callable[[str, Size], int] = fresh_peak) -> list[Row]:
    peaks = {task: peak_of(task, size) for task in TASKS}
    teacher = peaks["teacher"]
    rows = [row(f"peak memory: {task}", value / 1e6, None, "MB") for task, value in peaks.items()]
    return [
        *rows,
        row("peak memory: chunked / plain KL", peaks["chunked KL"] / peaks["plain KL"], 0.25),
        row("peak memory: with REAP student / teacher alone",
            peaks["teacher and student"] / teacher, 1.15),
        row("peak memory: with REAP student and a Router KD step / teacher alone",
            peaks["teacher, student and a step"] / teacher),
    ]  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(str(peak(sys.argv[1], Size(**json.loads(sys.argv[2])))))
