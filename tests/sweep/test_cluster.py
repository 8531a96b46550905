"""What a cluster lacks is said in one sentence before anything is submitted."""

import os
import stat
from pathlib import Path

import pytest

from rerail.errors import InputError
from rerail.sweep.cluster import COMMANDS, check_cluster, check_walltime, local_environment, minutes

SINFO = """low*|1-00:00:00|2|gpu:2
high|60:00|2|gpu:2
big|infinite|3|gpu:a100:8(S:0-1)
big|infinite|1|gpu:3090:1,gpu:tesla:1
cpu|infinite|9|(null)
"""
GOOD = {
    "sinfo": f"cat <<'E'\n{SINFO}E",
    "sacct": "test \"$*\" = '-o JobID,State,NodeList --parsable2 -j 1' && "
    "echo 'JobID|State|NodeList'",
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put fake commands of Slurm alone on PATH; a script of None leaves the command out."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(**scripts: str | None) -> Path:
        for name in COMMANDS:
            script = {**GOOD, **scripts}.get(name, "exit 9")
            if script is not None:
                path = folder / name
                path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
                path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    return install


def refused(**asked) -> str:
    with pytest.raises(InputError) as caught:
        check_cluster(**{"partition": "low", "timeout_min": 60, **asked})
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "asked",
    [
        {"partition": "low", "timeout_min": 1440, "gpus_per_node": 2, "nodes": 2},
        {"partition": None, "timeout_min": 600},
        {"partition": "high,big", "timeout_min": 5000, "gpus_per_node": 8, "nodes": 3},
        {"partition": "big", "timeout_min": 60, "gpus_per_node": 2, "nodes": 4},
        {"partition": "cpu", "timeout_min": 11, "nodes": 9, "signal_delay_s": 60},
    ],
)
def test_what_the_cluster_offers_passes(fake, asked):
    fake()
    check_cluster(**asked)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_command_is_named_with_the_way_to_a_local_cluster(fake, name):
    fake(**{name: None})
    message = refused()
    assert message.startswith(f"{name} not found")
    assert "make slurm-up" in message


def test_a_controller_that_does_not_answer_is_named(fake):
    fake(sinfo="echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    message = refused()
    assert "controller does not answer" in message
    assert "Unable to contact" in message


def test_a_cluster_without_accounting_is_refused_since_submitit_would_wait_for_ever(fake):
    fake(sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    message = refused()
    assert message == "sacct does not work on this cluster: Slurm accounting storage is disabled"


def test_a_sacct_of_another_kind_is_refused(fake):
    fake(sacct="echo hello")
    assert "'hello" in refused()


def test_an_unknown_partition_gets_the_list_of_those_that_exist(fake):
    fake()
    message = refused(partition="hgih")
    assert "hgih does not exist; allowed: big, cpu, high, low" in message


def test_no_partition_without_a_default_gets_the_list(fake):
    fake(sinfo="echo 'only|infinite|1|(null)'")
    assert "allowed: only" in refused(partition=None)


@pytest.mark.parametrize(("partition", "most"), [("low", 1440), ("high", 60)])
def test_a_walltime_above_the_limit_of_the_partition_is_refused(fake, partition, most):
    fake()
    message = refused(partition=partition, timeout_min=1441)
    assert "timeout_min=1441" in message
    assert f"at most {most}" in message


@pytest.mark.parametrize(("limit", "delay", "least"), [(10, 90, 11), (19, 600, 22), (1, 0, 11)])
def test_a_walltime_too_short_to_checkpoint_is_refused_before_slurm_is_asked(limit, delay, least):
    with pytest.raises(InputError, match=f"timeout_min={limit} .* at least {least} minutes"):
        check_walltime(limit, delay)
    check_walltime(least, delay)


def test_a_job_of_the_shortest_walltime_is_preempted_and_not_timed_out_for_submitit(monkeypatch):
    """The floor is submitit's own: below it every preemption counts as a timeout."""
    from submitit.core import job_environment, utils

    def is_timed_out(limit: int) -> bool:
        work = utils.DelayedSubmission(print)
        work.set_timeout(limit, 3)
        handler = job_environment.SignalHandler(None, None, work)
        return handler.has_timed_out()

    check_walltime(11, 90)
    assert not is_timed_out(11)
    assert is_timed_out(10)


@pytest.mark.parametrize(
    ("partition", "gpus", "nodes", "message"),
    [
        ("low", 3, 1, "have up to 2 GPUs"),
        ("low", 2, 3, "has 2 such"),
        ("big", 8, 4, "has 3 such; its 4 nodes have up to 8 GPUs"),
        ("cpu", 1, 1, "have up to 0 GPUs"),
    ],
)
def test_gpus_or_nodes_that_are_not_there_are_refused(fake, partition, gpus, nodes, message):
    fake()
    assert message in refused(partition=partition, gpus_per_node=gpus, nodes=nodes)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("60:00", 60), ("1-00:00:00", 1440), ("2:30:00", 150), ("0:30", 0.5), ("infinite", None)],
)
def test_times_of_slurm_are_read_as_minutes(limit, expected):
    assert minutes(limit) == (float("inf") if expected is None else expected)


def test_the_local_cluster_is_found_only_while_it_answers(fake, tmp_path, monkeypatch):
    home = tmp_path / "outputs" / "slurm"
    home.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RERAIL_SLURM", raising=False)
    answers = (
        f'test "$1 $SLURM_CONF" = "ping {home}/slurm.conf" && echo "Slurmctld(primary) at h is'
    )
    fake(scontrol=f'{answers} UP"')
    with pytest.raises(InputError, match=f"no local cluster is running in {home}.*make slurm-up"):
        local_environment()
    (home / "slurm.conf").touch()
    variables = local_environment()
    assert variables["SLURM_CONF"] == str(home / "slurm.conf")
    assert variables["PATH"] == f"{home}/bin:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", variables["PATH"])
    assert local_environment() == variables, "asked twice it is the same"
    fake(scontrol=f'{answers} DOWN"; exit 1')
    with pytest.raises(InputError, match="no local cluster is running"):
        local_environment()


def test_a_folder_named_by_the_environment_is_the_only_place_that_counts(
    fake, tmp_path, monkeypatch
):
    fake(scontrol="echo 'Slurmctld(primary) at h is UP'")
    for name in ("outputs/slurm", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "slurm.conf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RERAIL_SLURM", str(tmp_path / "elsewhere"))
    assert local_environment()["SLURM_CONF"] == str(tmp_path / "elsewhere" / "slurm.conf")
    monkeypatch.setenv("RERAIL_SLURM", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere; start one"):
        local_environment()
