"""The demo: both zoo models x one method of each paradigm, side by side, one process a model."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rerail.cli.screen import finish
from rerail.files import check_replaceable, make_folder, refusals
from rerail.sweep.states import status_of

MODELS = ("tiny_fine", "tiny_coarse")
METHODS = ("reap", "hc_smoe", "mobe")
STEPS = (
    *("check", "text", "load", "plan", "apply", "evaluate teacher"),
    *("evaluate compressed", "repair", "evaluate repaired"),
)


def demo(arguments: Sequence[str]) -> int:
    """Run the demo and return the exit status."""
    parser = argparse.ArgumentParser(prog="rerail demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"))
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides, as in debug=fast")
    options = parser.parse_args(arguments)
    out = options.out.absolute()
    make_folder(out)
    with _progress() as progress:
        children = {m: _start(m, out, options.overrides) for m in MODELS}
        bars = {m: progress.add_task(m, total=len(METHODS) * len(STEPS)) for m in MODELS}
        while any(child.poll() is None for child in children.values()):
            for model in MODELS:
                _show(progress, bars[model], model, out)
            time.sleep(0.5)
        for model in MODELS:
            _show(progress, bars[model], model, out)
    finish(out, "rerail demo")
    failed = [m for m, child in children.items() if child.returncode]
    for model in failed:
        sys.stderr.write(f"rerail: the demo of {model} failed; see {out / f'{model}.log'}\n")
    return 2 if failed else 0


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<46}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns)


def _start(model: str, out: Path, overrides: Sequence[str]) -> "subprocess.Popen[bytes]":
    words = [
        f"model={model}",
        f"compressor={','.join(METHODS)}",
        "ratio=half",
        f"out={out}",
        *overrides,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "RERAIL_NO_SUMMARY": "1",
    }
    path = out / f"{model}.log"
    check_replaceable(path)
    with refusals(path), path.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "rerail", "-m", *words], stdout=log, stderr=log, env=environment
        )


def _show(progress: Progress, bar: TaskID, model: str, out: Path) -> None:
    done, label = 0, model
    for path in sorted(out.glob(f"{model}-*/status.json")):
        status = status_of(path.parent)
        if status.get("state", "running") != "running":
            done += len(STEPS)
        elif status.get("stage") in STEPS:
            done += STEPS.index(status["stage"])
            label = f"{path.parent.name.rsplit('-r', 1)[0]}: {status['stage']}"
    progress.update(bar, completed=done, description=label)
