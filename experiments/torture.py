"""Kill a small sweep at random moments, start it again, and compare what it ends with.

`make torture`: every process of the sweep gets SIGKILL at a moment drawn evenly from the time that
an undisturbed sweep takes, until it ends by itself; then all starts over in new folders. Rows must
be those of the undisturbed sweep, bit for bit, in every column but time and host.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import rerail.run.exporting  # noqa: F401  (what every fork would import anew)
from rerail.config.presets import config_root
from rerail.run.cell import Cell
from rerail.run.pipeline import run_or_record
from rerail.run.results import read_rows

MAY_DIFFER = ("host", "time", "seconds", "evaluation_seconds", "peak_memory", "revision")
GRID = (
    ("compressor=reap", "ratio=half"),
    ("compressor=hc_smoe", "ratio=half"),
    ("compressor=rtn", "ratio=bits4"),
    ("compressor=naee_skip", "skip=quarter"),
)
EXPORTED = ("compressor=svd", "ratio=half", "export=package")
SENTENCE = "It was a bright cold day, and the clocks were striking thirteen. "


def checkpoint(folder: Path) -> None:
    """Write a tiny random model, the tokenizer of the zoo, and a text."""
    config = Qwen3MoeConfig(
        vocab_size=4_096, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_experts=8, num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, norm_topk_prob=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    zoo = Path(sys.modules["rerail"].__path__[0]) / "zoo" / "tiny_fine"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(zoo / name, folder / name)
    lines = [json.dumps({"text": f"{i}: {SENTENCE * (8 + i % 4)}"}) for i in range(80)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")


def cells_of(folder: Path, grid: Sequence[Sequence[str]]) -> list[Cell]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from rerail.run.compose import to_cell

    text = f"[{folder / 'text.jsonl'}]"
    shared = (
        "model=local", f"model.path_or_id={folder}", "calibration=files", "evaluation=file",
        f"calibration.sources.0.paths={text}", f"evaluation.texts.file.sources.0.paths={text}",
        "samples.count=48", "calibration.block=32", "evaluation.texts.file.block=32",
        "evaluation.texts.file.samples=24", "evaluation.new_tokens=4", "trainer=cpu",
        "trainer.enable_progress_bar=false", "++distill.batch_size=4", "++distill.epochs=3",
    )  # fmt: skip
    made = []
    for words in grid:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
            made.append(to_cell(compose("config", [*shared, *words]), "torture"))
    return made


def sweep(cells: Sequence[Cell], folder: Path) -> int:
    """Run the cells in a process group of their own; return its id."""
    if child := os.fork():
        return child
    status = 1
    with contextlib.suppress(BaseException):
        os.setsid()
        os.environ["RERAIL_CACHE"] = str(folder / "cache")
        folder.mkdir(parents=True, exist_ok=True)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        for cell in cells:
            run_or_record(cell, folder / "out")
        status = 0
    os._exit(status)


def ended(child: int, seconds: float) -> int | None:
    """Wait for a child; return its exit status, or None where it is still running."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(0.005, left))
    return None


def kill(child: int) -> None:
    """Kill the whole group; a child that has not yet made its own is killed alone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


def stage_of(folder: Path) -> str:
    """Return what a killed sweep was doing, by its own status files."""
    stage = "before the first cell"
    for path in sorted(folder.glob("out/*/status.json"), key=lambda p: p.stat().st_mtime):
        status = json.loads(path.read_text(encoding="utf-8"))
        stage = status["stage"] if status["state"] == "running" else "between cells"
    return stage


def outcome(folder: Path) -> list[dict[str, Any]]:
    """Return the rows without time and host, sorted."""
    rows = read_rows(folder / "out")
    equal = [{k: v for k, v in row.items() if k not in MAY_DIFFER} for row in rows]
    return sorted(json.loads(json.dumps(equal)), key=lambda r: (r["key"], r["stage"] or ""))


def unreadable(folder: Path) -> list[str]:
    """Return the files below a folder that are not whole: JSON or safetensors that do not open."""
    bad = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                with safe_open(path, "pt") as tensors:
                    list(tensors.keys())
        except Exception as error:
            bad.append(f"{path.relative_to(folder)}: {error}")
    return bad


@dataclass
class Counts:
    """What happened.

    Attributes:
        kills: by what the sweep was doing.
        completed: sweeps that ended after kills.
        differing: of these, the ones with other rows.
        corrupt: files that did not open, at any moment after a kill.
        seconds: that the undisturbed sweep takes.
    """

    kills: Counter[str] = field(default_factory=Counter)
    completed: int = 0
    differing: int = 0
    corrupt: list[str] = field(default_factory=list)
    seconds: float = 0.0


def torture(kills: int, grid: Sequence[Sequence[str]], seed: int, base: Path) -> Counts:
    """Kill so often, and let the last sweep end.

    Raises:
        RuntimeError: the undisturbed sweep, or one that was not killed, failed.
    """
    counts, draw = Counts(), random.Random(seed)
    model = base / "model"
    model.mkdir(parents=True)
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        checkpoint(model)
        os._exit(0)
    cells = cells_of(model, grid)
    began = time.monotonic()
    _finish(sweep(cells, base / "undisturbed"), base / "undisturbed")
    counts.seconds, expected = time.monotonic() - began, outcome(base / "undisturbed")
    while counts.kills.total() < kills:
        folder = base / f"sweep{counts.completed}"
        done = None
        while done is None:
            child = sweep(cells, folder)
            last = counts.kills.total() >= kills
            done = ended(child, 1e6 if last else draw.uniform(0, counts.seconds))
            if done is None:
                kill(child)
                counts.kills[stage_of(folder)] += 1
                counts.corrupt += unreadable(folder)
        if done:
            raise RuntimeError(f"a sweep failed: see {folder / 'log.txt'}")
        counts.completed += 1
        counts.differing += outcome(folder) != expected
        counts.corrupt += unreadable(folder)
        shutil.rmtree(folder)
    return counts


def _finish(child: int, folder: Path) -> None:
    if ended(child, 1e6):
        raise RuntimeError(f"the undisturbed sweep failed: see {folder / 'log.txt'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        counts = torture(arguments.kills, (*GRID, EXPORTED), arguments.seed, Path(name))
    print(f"an undisturbed sweep of {len(GRID) + 1} cells takes {counts.seconds:.1f} s")
    for stage, count in counts.kills.most_common():
        print(f"{count:5d} kills: {stage}")
    print(
        f"{counts.kills.total()} kills, {counts.completed} sweeps completed, {counts.differing} "
        f"with other results, {len(counts.corrupt)} files found corrupt (seed {arguments.seed})"
    )
    for line in counts.corrupt:
        print(f"corrupt: {line}")
    return int(bool(counts.differing or counts.corrupt))


if __name__ == "__main__":
    sys.exit(main())
