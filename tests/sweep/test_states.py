"""Every state that a cell can have, for sweeps in a process and for sweeps of jobs."""

import json

import pytest

from rerail.errors import InputError
from rerail.sweep import queue
from rerail.sweep.states import look
from sweep_folders import ELSEWHERE, GONE, result, status, sweep


def states(out):
    return {cell.folder: cell.state for cell in look(out).cells}


@pytest.fixture
def slurm(monkeypatch):
    """Answer as Slurm would: the jobs that wait or run, and how others ended."""
    active, ended = {}, {}
    monkeypatch.setattr(
        queue, "active", lambda ids, _="": {j: s for j, s in active.items() if j in ids}
    )
    monkeypatch.setattr(
        queue, "ended", lambda ids, _="": {j: s for j, s in ended.items() if j in ids}
    )
    return active, ended


def test_a_sweep_in_this_process_shows_what_is_done_runs_and_waits(tmp_path):
    sweep(tmp_path, ["a", "b", "c", "d", "e"])
    status(tmp_path, "a", "done")
    result(tmp_path, "a")
    status(tmp_path, "b", "failed", reason="no luck")
    result(tmp_path, "b", "failed", "no luck")
    status(tmp_path, "c", "not_applicable")
    result(tmp_path, "c", "not_applicable", "out of reach")
    progress = {"label": "step", "done": 3, "of": 9}
    status(tmp_path, "d", "running", stage="repair", progress=progress)
    view = look(tmp_path)
    assert states(tmp_path) == {
        "a": "done",
        "b": "failed",
        "c": "not_applicable",
        "d": "running",
        "e": "pending",
    }
    assert view.cells[1].detail == "no luck"
    assert view.cells[3].detail == "repair, step: 3 of 9"
    assert view.exit_code == 3


def test_a_cell_whose_process_is_gone_is_lost_and_so_is_one_that_never_began(tmp_path):
    sweep(tmp_path, ["a", "b"], process=GONE)
    status(tmp_path, "a", "running", stage="plan", **GONE)
    view = look(tmp_path)
    assert [cell.state for cell in view.cells] == ["lost", "lost"]
    assert "plan" in view.cells[0].detail
    assert view.exit_code == 1


def test_a_cell_that_runs_on_another_host_is_believed(tmp_path):
    sweep(tmp_path, ["a"], process=ELSEWHERE)
    status(tmp_path, "a", "running", stage="plan", **ELSEWHERE)
    assert states(tmp_path) == {"a": "running"}


def test_jobs_that_wait_run_or_were_requeued(tmp_path, slurm):
    sweep(tmp_path, ["a", "b", "c"], {0: "7_0", 1: "7_1", 2: "7_2"})
    slurm[0].update({"7_0": "PENDING", "7_1": "RUNNING", "7_2": "PENDING"})
    status(tmp_path, "b", "running", stage="load", job="7_1", **ELSEWHERE)
    status(tmp_path, "c", "running", stage="repair", job="7_2", **GONE)
    view = look(tmp_path)
    assert [cell.state for cell in view.cells] == ["pending", "running", "pending"]
    assert view.cells[2].detail == "goes on after repair"
    assert [cell.job for cell in view.cells] == ["7_0", "7_1", "7_2"]


def test_jobs_that_ended_without_a_word_are_lost_with_slurms_reason(tmp_path, slurm):
    path = sweep(tmp_path, ["a", "b"], {0: "7_0", 1: "7_1"})
    slurm[1].update({"7_0": "CANCELLED", "7_1": "NODE_FAIL"})
    status(tmp_path, "b", "running", stage="plan", job="7_1", **ELSEWHERE)
    view = look(tmp_path)
    assert [cell.state for cell in view.cells] == ["lost", "lost"]
    assert str(path / "jobs" / "7_0_0_log.err") in view.cells[0].detail
    assert "NODE_FAIL" in view.cells[1].detail


def test_without_slurm_on_this_host_jobs_are_not_called_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "active", lambda *_: None)
    sweep(tmp_path, ["a", "b"], {0: "7_0", 1: "7_1"})
    status(tmp_path, "a", "running", stage="plan", job="7_0", **ELSEWHERE)
    assert states(tmp_path) == {"a": "running", "b": "pending"}


def test_a_finished_cell_stays_done_whatever_a_second_process_says(tmp_path):
    status(tmp_path, "a", "running", stage="plan", **GONE)
    result(tmp_path, "a")
    assert states(tmp_path) == {"a": "done"}


def test_a_failed_cell_that_was_submitted_again_is_pending(tmp_path, slurm):
    sweep(tmp_path, ["a"], {0: "7"})
    status(tmp_path, "a", "failed", job="7")
    result(tmp_path, "a", "failed", "no luck")
    assert states(tmp_path) == {"a": "failed"}
    sweep(tmp_path, ["a"], {0: "8"})
    slurm[0]["8"] = "PENDING"
    assert states(tmp_path) == {"a": "pending"}


def test_a_cell_that_a_later_sweep_found_on_its_way_keeps_its_job(tmp_path, slurm):
    sweep(tmp_path, ["a"], {0: "7"})
    path = sweep(tmp_path, ["a"], {})
    content = json.loads((path / "cells.json").read_text())
    content["cells"][0]["state"] = "active"
    (path / "cells.json").write_text(json.dumps(content))
    slurm[0]["7"] = "RUNNING"
    assert [(c.state, c.job) for c in look(tmp_path).cells] == [("running", "7")]


def test_what_cannot_be_read_is_noted_left_alone_and_the_rest_is_shown(tmp_path):
    status(tmp_path, "good", "done")
    result(tmp_path, "good")
    texts = {
        "older/result.json": '[{"nll": 3.0}]',
        "half/status.json": '{"state": "runn',
        "foreign/status.json": "[1, 2]",
        "sweeps/20200101-000000-abc/cells.json": '{"cells": 3}',
        "sweeps/20200102-000000-abc/cells.json": "not JSON",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    view = look(tmp_path)
    assert {c.folder: c.state for c in view.cells} == {
        "good": "done",
        "older": "unreadable",
        "half": "unreadable",
        "foreign": "unreadable",
    }
    for name in texts:
        assert any(name in note for note in view.notes), name
    assert {name: (tmp_path / name).read_text() for name in texts} == texts
    assert view.exit_code == 1


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        look(tmp_path / "nowhere")


def test_nothing_at_all_is_nothing_left_to_do(tmp_path):
    assert look(tmp_path).cells == []
    assert look(tmp_path).exit_code == 0


def test_choices_that_were_mended_are_forgotten_and_others_are_not(tmp_path):
    def mistyped(number):
        name = f"failed-{number:08x}"
        result(tmp_path, name, "failed", "no such choice")
        return name

    grid = ["a", mistyped(1)]
    sweep(tmp_path, grid)
    alone = [mistyped(2)]
    sweep(tmp_path, alone)
    status(tmp_path, "a", "done")
    result(tmp_path, "a")
    failed = dict.fromkeys((grid[1], alone[0]), "failed")
    assert states(tmp_path) == {"a": "done", **failed}  # the second one takes no one's place
    other = ["b", mistyped(3)]
    sweep(tmp_path, other, process=GONE)
    result(tmp_path, "b")
    assert states(tmp_path) == {"a": "done", grid[1]: "failed", "b": "done", other[1]: "failed"}
    sweep(tmp_path, ["a", other[1]])
    assert states(tmp_path) == {"a": "done", "b": "done", other[1]: "failed"}
    sweep(tmp_path, ["b", "a"])
    assert states(tmp_path) == {"a": "done", "b": "done"}
    assert look(tmp_path).exit_code == 0
    assert not list(tmp_path.glob("failed-*"))


def test_only_what_a_refusal_leaves_is_removed(tmp_path):
    names = [f"failed-{n:08x}" for n in range(3)]
    result(tmp_path, names[0], "failed", "no")
    (tmp_path / names[0] / "notes.txt").write_text("mine")
    result(tmp_path, names[1], "done")
    (tmp_path / names[2]).mkdir()
    (tmp_path / names[2] / "result.json").write_text("[]")
    result(tmp_path, "failed-x", "failed", "no")
    result(tmp_path.parent, "failed-00000009", "failed", "no")
    sweep(tmp_path, [*names, "failed-x", "../failed-00000009"])
    sweep(tmp_path, ["a"])
    left = {path.name for path in tmp_path.glob("failed-*")}
    assert left == {*names, "failed-x"}
    assert (tmp_path / names[0] / "notes.txt").read_text() == "mine"
    assert (tmp_path.parent / "failed-00000009" / "result.json").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"cells": [{"n": float("inf"), "folder": "a"}]},
        {"cells": [{"n": 0, "folder": "a\0b"}]},
        {"cells": [3]},
        {"cells": [{"n": 0}]},
        {"process": 3},
    ],
)
def test_a_half_typed_sweep_is_noted_and_the_others_are_shown(tmp_path, changed):
    sweep(tmp_path, ["a"])
    path = sweep(tmp_path, ["b"], **changed)
    view = look(tmp_path)
    assert [cell.folder for cell in view.cells] == ["a"]
    assert [path.name in note for note in view.notes] == [True]
