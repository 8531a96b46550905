"""What the tests of sweeps on the cluster share: a model, a bench, and a sweep without mishaps."""

import json
import shutil
from pathlib import Path

import pytest

import rerail
from families import tiny
from slurm_bench import Bench, Done, rows

ZOO = Path(rerail.__file__).parent / "zoo/tiny_fine"


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("qwen3_moe", vocab_size=4096).model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ZOO / name, folder / name)
    text = "It was a bright cold day, and the clocks were striking thirteen. "
    lines = [json.dumps({"text": f"{i}: {text * (3 + i % 4)}"}) for i in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def bench(cluster, tmp_path, model) -> Bench:
    return Bench(cluster, tmp_path, model)


@pytest.fixture(scope="session")
def grid(slurm_session, tmp_path_factory, model) -> tuple[Bench, Done]:
    """Return a sweep that was waited for: a good cell, one that fails, two out of reach."""
    made = Bench(slurm_session, tmp_path_factory.mktemp("grid"), model)
    words = made.words("trainer.accelerator=cpu,nonsense", "ratio.removed=0.25,0.9")
    return made, made.rerail(*words)


@pytest.fixture(scope="session")
def undisturbed(grid) -> list[dict]:
    """Return the rows of the good cell."""
    bench, done = grid
    [folder] = bench.done()
    assert rows(folder), done.said
    return rows(folder)
