"""What all tests share: one thread, no network, and the switch that rewrites golden plans."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import pytest
import torch

torch.set_num_threads(1)
pytest_plugins = ["slurm_cluster"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden",
        action="store_true",
        help="write the golden plans anew; give the reason a line in CHANGELOG.md",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--regenerate-golden") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--regenerate-golden writes one file a method: run it without -n")


def pytest_collection_finish() -> None:
    # what is imported by now stays: without it each gc.collect() of a cell takes half a second
    gc.collect()
    gc.freeze()


@pytest.fixture
def regenerate_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--regenerate-golden"))
