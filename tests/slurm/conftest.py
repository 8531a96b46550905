"""What the tests of sweeps on the cluster share: a model, a bench, and a sweep without mishaps."""

from pathlib import Path

import pytest

from checkpoints import checkpoint
from slurm_bench import Bench, Done, rows


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def bench(cluster, tmp_path, model) -> Bench:
    return Bench(cluster, tmp_path, model)


@pytest.fixture(scope="session")
def grid(slurm_session, tmp_path_factory, model) -> tuple[Bench, Done]:
    """Return a sweep that was waited for: a good cell, one that fails, two out of reach."""
    made = Bench(slurm_session, tmp_path_factory.mktemp("grid"), model)
    words = made.words("trainer.accelerator=cpu,gpu", "ratio.removed=0.25,0.9")
    return made, made.rerail(*words)


@pytest.fixture(scope="session")
def undisturbed(grid) -> list[dict]:
    """Return the rows of the good cell."""
    bench, done = grid
    [folder] = bench.done()
    assert rows(folder), done.said
    return rows(folder)
