"""A process on record is distinguished from a later one with the same number."""

import json
import subprocess
import sys

import pytest

from rerail import processes


@pytest.fixture
def child():
    code = "import json, sys; from rerail.processes import this_process"
    code += "; print(json.dumps(this_process()), flush=True); sys.stdin.read()"
    made = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
    yield made
    made.communicate()


def test_a_process_is_found_while_it_runs_and_not_after(child):
    record = json.loads(child.stdout.readline())
    assert processes.running_process(record).pid == child.pid
    child.communicate()
    assert processes.running_process(record) is None


def test_a_later_process_with_the_same_number_is_another(child):
    record = json.loads(child.stdout.readline())
    assert processes.running_process({**record, "started": record["started"] - 60}) is None


def test_a_process_of_another_host_is_not_looked_for():
    record = {**processes.this_process(), "host": "elsewhere"}
    assert processes.running_process(record) is None
    assert not processes.is_on_this_host(record)


@pytest.mark.parametrize("record", [{}, {"host": processes.this_process()["host"], "pid": "x"}])
def test_a_foreign_record_is_no_process(record):
    assert processes.running_process(record) is None


def test_the_job_is_named_as_slurm_names_it(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert processes.slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    assert processes.slurm_job() == "14"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert processes.slurm_job() == "12_3"


def test_half_of_an_array_is_no_job(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    assert processes.slurm_job() is None
