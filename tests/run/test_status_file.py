"""The status file: who works on the cell and how far, written seldom and by one process."""

import json
import os

import pytest

from rerail.errors import InputError
from rerail.processes import running_process
from rerail.run import status as status_file
from rerail.run.mirror import Live
from rerail.run.recorder import CellRecorder
from rerail.run.status import Status


@pytest.fixture
def status(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    return Status(tmp_path)


def read(status: Status) -> dict:
    return json.loads(status.path.read_text())


def test_it_names_the_process_and_the_job(status):
    status.write("running", "plan")
    content = read(status)
    assert (content["state"], content["stage"], content["job"]) == ("running", "plan", "12_3")
    assert running_process(content).pid == os.getpid()


def test_the_items_of_a_bar_are_progress(status, tmp_path, monkeypatch):
    monkeypatch.setattr(status_file, "EVERY", 0.0)
    status.write("running", "evaluate teacher")
    recorder = CellRecorder(None, tmp_path, status, Live())
    items = recorder.progress("teacher on docs")(["a", "b", "c"])
    seen = [read(status)["progress"] for _ in items]
    assert seen == [{"label": "teacher on docs", "done": n, "of": 3} for n in range(3)]
    assert read(status)["stage"] == "evaluate teacher"


def test_progress_is_written_seldom_and_a_state_at_once(status):
    status.write("running", "plan")
    status.progress("statistics", 1, 9)
    assert read(status)["progress"] is None
    status.write("running", "apply")
    assert read(status)["stage"] == "apply"
    status._written -= status_file.EVERY
    status.progress("statistics", 2, 9)
    assert read(status)["progress"] == {"label": "statistics", "done": 2, "of": 9}


def test_a_failure_keeps_the_stage(status):
    status.write("running", "load")
    status.write("failed", status.stage, "no luck")
    assert (read(status)["stage"], read(status)["reason"]) == ("load", "no luck")


def test_only_the_first_of_several_processes_writes(status, monkeypatch):
    monkeypatch.setattr(status_file, "is_first", lambda: False)
    status.write("running", "plan")
    assert not status.path.exists()


def test_a_status_that_cannot_be_written_ends_no_work_and_covers_up_no_failure(status, monkeypatch):
    monkeypatch.setattr(status_file, "EVERY", 0.0)
    status.path.mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        status.write("running", "plan")
    status.progress("statistics", 1, 9)
    status.fail("no luck")
    assert status.stage == "plan"
