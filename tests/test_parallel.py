"""Processes that run one cell: what they say to each other, and how they measure together."""

import os

import pytest
import torch

from families import tiny
from measuring import batches
from rank_programs import STATISTICS
from rerail import parallel
from rerail.distill.trainer import check_processes
from rerail.errors import InputError
from rerail.evaluate.perplexity import score_blocks
from rerail.statistics.collect import collect
from rerail.teacher.hidden_states import final_hidden_states
from students import merged
from together import together

STARTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_JOB_NAME")
SLURM = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")


@pytest.fixture
def environment(monkeypatch):
    for name in (*STARTED, *SLURM):
        monkeypatch.delenv(name, raising=False)

    def put(**words):
        for name, word in words.items():
            monkeypatch.setenv(name, str(word))

    return put


def test_one_process_is_first_and_alone(environment):
    assert parallel.rank_and_size() == (0, 1)
    assert parallel.is_first()
    assert parallel.gather("a") == parallel.gather_on_first("a") == ["a"]
    assert parallel.broadcast_from_first(lambda: 3) == parallel.run_on_first(lambda: 3) == 3
    assert parallel.my_share([1, 2, 3]) == (0, [1, 2, 3])
    assert parallel.reduce_in_rank_order(2, lambda a, b: a + b) == 2


def test_torchrun_and_slurm_say_which_process_this_is(environment):
    environment(SLURM_NTASKS=16, SLURM_PROCID=11, SLURM_LOCALID=3, SLURM_NTASKS_PER_NODE=8)
    assert parallel.rank_and_size() == (11, 16)
    assert parallel.node_rank_and_size() == (3, 8)
    assert not parallel.is_first()
    environment(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)
    assert parallel.rank_and_size() == (1, 2)
    assert parallel.node_rank_and_size() == (1, 2)


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
@pytest.mark.parametrize("words", [(2, 2), (0, 0), (5, 2)])
def test_a_rank_beyond_the_number_of_processes_is_refused(environment, names, words):
    environment(**dict(zip(names, words, strict=True)))
    with pytest.raises(InputError, match="contradict each other"):
        parallel.rank_and_size()


def test_a_place_to_meet_that_slurm_does_not_name_is_refused(environment, monkeypatch):
    environment(SLURM_NTASKS=2, SLURM_PROCID=0, SLURM_JOB_ID="abc", SLURM_NODELIST="n1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    with pytest.raises(InputError, match="set MASTER_ADDR and MASTER_PORT"):
        parallel.join()


def test_an_interactive_allocation_is_one_process(environment):
    environment(SLURM_NTASKS=4, SLURM_PROCID=0, SLURM_JOB_NAME="interactive")
    assert parallel.rank_and_size() == (0, 1)


@pytest.mark.parametrize(
    ("size", "trainer", "sentence"),
    [
        (2, {}, "2 processes started and trainer.strategy='auto' is for one"),
        (1, {"strategy": "ddp"}, "1 process started and trainer.strategy='ddp' is for several"),
        (2, {"strategy": "ddp", "devices": 8}, "needs 8 processes and 2 started"),
        (8, {"strategy": "fsdp2", "devices": 8, "num_nodes": 2}, "needs 16 processes and 8"),
    ],
)
def test_processes_that_do_not_fit_the_trainer_are_refused(environment, size, trainer, sentence):
    environment(RANK=0, WORLD_SIZE=size)
    with pytest.raises(InputError, match=sentence):
        check_processes(trainer)


@pytest.mark.parametrize(
    ("size", "trainer"),
    [
        (1, {"devices": 1}),
        (1, {"strategy": "auto", "devices": "auto"}),
        (2, {"strategy": "ddp", "devices": "auto"}),
        (16, {"strategy": "fsdp2", "devices": 8, "num_nodes": 2}),
    ],
)
def test_processes_that_fit_are_welcome(environment, size, trainer):
    environment(RANK=0, WORLD_SIZE=size)
    check_processes(trainer)


@pytest.mark.parametrize(
    ("given", "address", "port"),
    [
        ({}, "n7", "16234"),
        ({"MASTER_ADDR": "127.0.0.1"}, "127.0.0.1", "16234"),
        ({"MASTER_PORT": "4711"}, "n7", "4711"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4711"}, "127.0.0.1", "4711"),
    ],
)
def test_tasks_of_a_slurm_job_meet_where_they_are_told_and_else_at_its_first_node(
    environment, monkeypatch, given, address, port
):
    environment(SLURM_NTASKS=2, SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_NTASKS_PER_NODE=2)
    environment(SLURM_JOB_ID=91234, SLURM_NODELIST="n[7-8]", MASTER_ADDR="", MASTER_PORT="")
    for name in {"MASTER_ADDR", "MASTER_PORT"} - given.keys():
        monkeypatch.delenv(name)
    environment(**given)
    joining = []

    def join_group(backend, **who):
        joining.append((os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], who["world_size"]))

    monkeypatch.setattr(torch.distributed, "init_process_group", join_group)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parallel.join()
    assert joining == [(address, port, 2)]


@pytest.mark.slow
def test_processes_tell_each_other_what_they_have(tmp_path):
    a, b = together("talks", tmp_path)
    assert (a["joined"], b["joined"]) == ([0, 2], [1, 2])
    assert a["refused"] == b["refused"] == ["OutOfReach", "a sentence"]
    assert a["broken"] == ["other", "nothing"]
    assert b["broken"] == ["other", "the first process stopped: ZeroDivisionError: nothing"]
    assert a["first"] == b["first"] == 10
    assert (a["alone"], b["alone"]) == (5, None)
    assert a["gathered"] == b["gathered"] == [0, 1]
    assert (a["gathered first"], b["gathered first"]) == ([0, 1], [])
    assert a["folded"] == b["folded"] == [0, 1]
    assert a["part"] == [[0, [0, 1]], [0, []]]
    assert b["part"] == [[2, [2, 3, 4]], [0, []]]
    assert a["kept"] == b["kept"] == ["of 0", "of 0"]
    assert a["made"] == b["made"] == 1


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return together("measures", tmp_path_factory.mktemp("measures"))


def same_statistics(found, alone):
    kinds = set()
    for index, tensors in alone.tensors.items():
        for statistic in STATISTICS:
            ours, theirs = found[index][statistic.name], tensors[statistic.name]
            assert ours.dtype == theirs.dtype
            kinds.add((statistic.merges_by, ours.dtype))
            if statistic.merges_by != "add" or ours.dtype == torch.int64:
                assert torch.equal(ours, theirs), statistic.name
            elif ours.dtype == torch.float64:
                # a sum that cancels is as exact as its terms
                scale = float(theirs.abs().max())
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * scale)
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    return kinds


@pytest.mark.slow
def test_statistics_of_two_processes_are_those_of_one(measured):
    alone = collect(tiny("qwen3_moe"), batches(5, size=2), STATISTICS)
    kinds = set()
    for process in measured:
        kinds |= same_statistics(process["statistics"], alone)
    assert {merge for merge, _ in kinds} == {"add", "max", "sample"}
    assert {("add", torch.int64), ("add", torch.float64), ("add", torch.float32)} <= kinds


@pytest.mark.slow
def test_a_process_without_a_batch_changes_nothing(measured):
    alone = collect(tiny("qwen3_moe"), batches(5, size=2)[:1], STATISTICS)
    for process in measured:
        same_statistics(process["one batch"], alone)


@pytest.mark.slow
def test_scores_and_teacher_states_of_two_processes_are_those_of_one_to_the_bit(measured):
    model, text = tiny("qwen3_moe"), batches(5, size=2)
    teacher = score_blocks(model, text)
    scores = score_blocks(merged(model), text, teacher.hidden)
    assert float(scores.kl.sum()) > 0
    assert torch.equal(measured[0]["states"], final_hidden_states(model, text))
    for process in measured:
        assert torch.equal(process["hidden"], teacher.hidden)
        for name in ("nll", "kl", "esap", "agree", "tokens"):
            assert torch.equal(process[name], getattr(scores, name))
        assert process["active"] == scores.routing.mean_active_experts
        for layer, chosen in process["chosen"].items():
            assert torch.equal(chosen, scores.routing.slots(layer))
