"""Arguments of the trainer; repairs by several processes against one process."""

import inspect
import signal
import subprocess
import sys
from dataclasses import replace

import lightning
import pytest
import torch

from rank_programs import FORMS, SETTINGS, UNEVEN, fitted, form
from rerail.distill.batches import share_of_rank
from rerail.distill.settings import RouterKD
from rerail.distill.trainer import check_strategy, strategy_arguments, trainer_argument_names
from rerail.errors import InputError
from together import together

# float32: the gradients of a step's blocks are added in another order, and AdamW makes the most of
# a small one; relative for losses, absolute for rows, which move by 1e-2
CLOSE, LOOSE = (1e-6, 1e-6), (1e-5, 1e-4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return together("fits", tmp_path_factory.mktemp("fits"))


def assert_agree(two, single, losses, rows_by):
    for process in two:
        assert process["best_step"] == single["best_step"]
        assert [p["step"] for p in process["curve"]] == [p["step"] for p in single["curve"]]
        for a, b in zip(process["curve"], single["curve"], strict=True):
            assert a == pytest.approx(b, rel=losses)
        for name, rows in single["after"].items():
            torch.testing.assert_close(process["after"][name], rows, rtol=0, atol=rows_by)
    assert two[0]["curve"] == two[1]["curve"]
    assert all(torch.equal(two[0]["after"][n], two[1]["after"][n]) for n in single["after"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("name", "settings", "limits"),
    [
        ("even", SETTINGS, CLOSE),
        ("clipped", replace(SETTINGS, clip=1e-3), CLOSE),
        ("uneven", UNEVEN, LOOSE),
    ],
)
def test_two_processes_repair_as_one_does(results, strategy, name, settings, limits):
    single = fitted("auto", settings=settings)
    assert single["best_step"] > 0
    assert_agree([process[f"{strategy} {name}"] for process in results], single, *limits)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_every_stored_form_can_be_spread_over_processes(results, name):
    single = fitted("auto", form(name))
    assert_agree([process[f"fsdp2 {name}"] for process in results], single, *LOOSE)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_interrupted_fit_of_two_processes_ends_like_one_that_was_not(results, strategy):
    for process in results:
        whole, again = process[f"{strategy} whole"], process[f"{strategy} interrupted"]
        assert again["curve"] == whole["curve"]
        assert again["best_step"] == whole["best_step"]
        assert all(torch.equal(again["after"][n], rows) for n, rows in whole["after"].items())


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shares_are_equally_long_and_what_fills_them_weighs_nothing(ranks):
    index, weights = torch.arange(10, 17), torch.rand(7, 4) + 0.1
    parts = [share_of_rank(index, weights, rank, ranks) for rank in range(ranks)]
    assert len({len(mine) for mine, _ in parts}) == 1
    counted = [int(i) for mine, w in parts for i, row in zip(mine, w, strict=True) if row.any()]
    assert sorted(counted) == index.tolist()
    assert torch.stack([w.sum() for _, w in parts]).sum() == pytest.approx(float(weights.sum()))


def test_the_arguments_of_the_trainer_are_known_without_importing_it():
    assert trainer_argument_names() == tuple(inspect.signature(lightning.Trainer).parameters)
    words = "from rerail.distill.trainer import trainer_argument_names as f; f()"
    heavy = "{'lightning', 'torch'} & sys.modules.keys()"
    code = f"import sys; {words}; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["rerail.api", "rerail.run.pipeline", "rerail.run.compose"])
def test_lightning_is_imported_only_where_something_is_trained(module):
    code = f"import sys, {module}; sys.exit('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_strategy_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="'fsdp' is not one of auto, ddp, fsdp2"):
        check_strategy({"strategy": "fsdp"}, RouterKD())


def test_a_live_teacher_is_refused_where_students_are_spread():
    with pytest.raises(InputError, match=r"use distill\.teacher=cached"):
        check_strategy({"strategy": "fsdp2"}, RouterKD(teacher="live"))
    check_strategy({"strategy": "ddp"}, RouterKD(teacher="live"))


def test_in_a_slurm_job_only_submitit_requeues(monkeypatch):
    for name, word in (("NTASKS", 1), ("PROCID", 0), ("LOCALID", 0), ("NODEID", 0)):
        monkeypatch.setenv(f"SLURM_{name}", str(word))
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    [environment] = strategy_arguments({})["plugins"]
    assert environment.auto_requeue is False
    before = signal.getsignal(signal.SIGUSR1)
    handlers = []

    class Recording(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            handlers.append(signal.getsignal(signal.SIGUSR1))

    fitted("auto", callbacks=[Recording()])
    assert handlers == [before]
