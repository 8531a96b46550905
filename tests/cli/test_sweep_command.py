"""`rerail-sweep` as a person or a script meets it."""

import csv
import json
import os
import subprocess
import sys
import time

import pytest

from rerail.cli import sweep as cli
from rerail.sweep import queue, table
from rerail.sweep.states import CellState, View
from sweep_folders import GONE, result, status, sweep


@pytest.fixture
def command(capsys):
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_status_needs_neither_torch_nor_transformers_nor_hydra(tmp_path):
    sweep(tmp_path, ["a"])
    result(tmp_path, "a")
    code = f"""
import sys
from rerail.cli.sweep import main
try:
    main(["status", {str(tmp_path)!r}, "--exit-code"])
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {{"torch", "transformers", "lightning", "hydra", "submitit", "wandb", "matplotlib"}}
sys.exit(" ".join(heavy & sys.modules.keys()) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert "1 done" in done.stdout


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (["done", "not_applicable"], 0),
        (["done", "failed"], 1),
        (["done", "failed", "pending"], 3),
        (["lost"], 1),
    ],
)
def test_the_exit_code_tells_only_when_asked(command, tmp_path, ends, code):
    process = {} if "pending" in ends else {"process": GONE}
    names = [f"cell{n}" for n in range(len(ends))]
    sweep(tmp_path, names, **process)
    for name, end in zip(names, ends, strict=True):
        if end not in ("pending", "lost"):
            status(tmp_path, name, end)
            result(tmp_path, name, end)
    assert command("status", str(tmp_path))[0] == 0
    got, out, _ = command("status", str(tmp_path), "--exit-code")
    assert got == code
    assert all(name in out for name in names)


def test_a_wrong_folder_is_a_sentence_and_exit_status_2(command, tmp_path):
    code, _, err = command("status", str(tmp_path / "no"))
    assert code == 2
    assert (
        err == f"rerail-sweep: {tmp_path / 'no'} does not exist; give the folder that a sweep "
        "was started with\n"
    )


def test_watching_ends_when_nothing_is_open_and_says_every_change_once(capsys):
    views = [
        View([CellState("a", "pending"), CellState("b", "running", "plan")]),
        View([CellState("a", "running", "load"), CellState("b", "running", "repair")]),
        View([CellState("a", "done"), CellState("b", "failed", "no luck")]),
    ]
    pages = iter(views)
    assert table.watch(lambda: next(pages), every=0).exit_code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines[:-1]] == [
        *("a pending", "b running: plan", "a running: load", "a done", "b failed: no luck")
    ]
    assert lines[-1] == "1 done, 1 failed"


def test_a_cell_that_seems_lost_is_looked_at_again_before_it_is_given_up(capsys):
    pages = iter(
        [View([CellState("a", "lost", "its job is gone")])] * 2 + [View([CellState("a", "done")])]
    )
    assert table.watch(lambda: next(pages), every=0).exit_code == 0
    assert table.watch(lambda: View([CellState("a", "lost")]), every=0).exit_code == 1
    assert "1 lost" in capsys.readouterr().out


SLEEP = """
import json, sys, time
from pathlib import Path
from rerail.processes import this_process
Path(sys.argv[1]).write_text(json.dumps(this_process()))
time.sleep(60)
"""


def test_cancel_stops_the_process_of_a_local_sweep_and_no_other(command, tmp_path):
    (tmp_path / "rerail").write_text(SLEEP)  # the name by which a process is known as ours
    (tmp_path / "editor").write_text(SLEEP)
    children = []
    for name, program in {"mine": "rerail", "recycled": "rerail", "foreign": "editor"}.items():
        file = tmp_path / f"{name}.json"
        children.append(subprocess.Popen([sys.executable, tmp_path / program, str(file)]))
        while not file.exists() or not file.read_text():
            time.sleep(0.05)
    mine, recycled, foreign = (
        json.loads((tmp_path / f"{n}.json").read_text()) for n in ("mine", "recycled", "foreign")
    )
    out = tmp_path / "out"
    try:
        sweep(out, ["a"], process=mine)
        status(out, "a", "running", stage="plan", **mine)
        sweep(out, ["b"], process={**recycled, "started": 1.0})
        status(out, "c", "running", stage="plan", **foreign)
        code, message, err = command("cancel", str(out))
        assert (code, message) == (0, f"stopped process {mine['pid']}\n")
        assert f"process {foreign['pid']} is named as one of this sweep, but its command" in err
        assert children[0].wait(timeout=20) < 0
        assert [child.poll() for child in children[1:]] == [None, None]
        assert "lost" in command("status", str(out))[1]
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_cancel_names_exactly_the_jobs_of_this_folder_that_are_not_over(
    command, tmp_path, monkeypatch
):
    cancelled = []
    monkeypatch.setattr(queue, "active", lambda ids, *_: {j: "RUNNING" for j in ids if j != "7_0"})
    monkeypatch.setattr(queue, "ended", lambda *_: {})
    monkeypatch.setattr(queue, "cancel", lambda ids, _="": cancelled.extend(ids) or True)
    sweep(tmp_path, ["a", "b"], {0: "7_0", 1: "7_1"})
    code, message, _ = command("cancel", str(tmp_path))
    assert (code, cancelled) == (0, ["7_1"])
    assert "7_1" in message


def test_cancel_without_slurm_says_that_nothing_was_cancelled(command, tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "active", lambda *_: None)
    sweep(tmp_path, ["a"], {0: "7"})
    code, _, err = command("cancel", str(tmp_path))
    assert code == 2
    assert "not cancelled" in err


def test_slurm_is_asked_for_the_users_jobs_and_then_for_those_that_ended(tmp_path, monkeypatch):
    for name, text in {
        "squeue": "echo '7_0|RUNNING|sweep'; echo '9|PENDING|mine'",
        "sacct": "echo 'JobID|State'; echo '7_1|CANCELLED by 0'; echo '7_1.batch|CANCELLED'",
        "scancel": "exit 1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert queue.active({"7_0", "7_1"}) == {"7_0": "RUNNING"}
    assert queue.active({"7_0", "9"}, named="sweep") == {"7_0": "RUNNING"}  # not a job of mine
    assert queue.ended({"7_1"}) == {"7_1": "CANCELLED"}
    assert not queue.cancel(["7_0"])
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert queue.active({"7_0"}) is None


def test_collect_writes_the_tables_of_what_is_there(command, tmp_path):
    sweep(tmp_path, ["a", "b"], process=GONE)
    result(tmp_path, "a")
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "result.json").write_text('[{"nll": 3.0}]')
    code, out, _ = command("collect", str(tmp_path))
    assert code == 1
    assert "1 done, 1 lost, 1 unreadable" in out
    with (tmp_path / "results.csv").open(newline="") as handle:
        assert [row["key"] for row in csv.DictReader(handle)] == ["key-a"]
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("/venv/bin/python /venv/bin/rerail -m seed=1,2", True),
        ("python3.11 -u -X dev -m rerail -m seed=1", True),
        ("python -m rerail.cli.main seed=1", True),
        ("rerail seed=1", True),
        ("python -m pytest rerail", False),
        ("python -c rerail", False),
        ("python -m rerailer", False),
        ("python", False),
        ("vim rerail", False),
        ("/bin/sleep 60", False),
        ("", False),
    ],
)
def test_a_process_is_ours_by_the_program_that_it_runs(line, ours):
    assert cli.is_rerail(line.split()) is ours


def test_a_job_that_is_no_number_is_no_word_for_slurm(command, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(queue, "_ask", lambda _, *words: asked.append(words) or "")
    sweep(tmp_path, ["a"], {0: "--user=root"})
    status(tmp_path, "b", "running", job="--user=root")
    code, _, err = command("cancel", str(tmp_path))
    assert code == 0
    assert "'--user=root' is no job of Slurm" in err
    assert asked == []


def test_markup_and_escapes_of_a_stranger_are_shown_and_not_obeyed(command, tmp_path):
    status(tmp_path, "[red]a", "failed", reason="\x1b[2J[bold]no luck\u202e", job="[/]")
    result(tmp_path, "[red]a", "failed", "\x1b]0;title\x07[link=x]no luck")
    for action in ("status", "collect"):
        _, out, err = command(action, str(tmp_path))
        assert not set("\x1b\x07\u202e") & set(out + err)
        assert "no luck" in out
        assert ("[red]a" if action == "status" else "[link=x]") in out


BAD = {
    "deep": "[" * 100_000,
    "long": '{"state": "running", "pid": %s}' % ("9" * 5000),
    "foreign": "[1, 2]",
    "half": '{"state": "runn',
    "surrogate": '{"state": "\\ud800"}',
}


@pytest.mark.parametrize("name", [*BAD, "pipe", "link", "folder"])
@pytest.mark.parametrize(
    "file", ["a/status.json", "a/result.json", "sweeps/20200101-0-a/cells.json"]
)
def test_one_bad_file_is_named_and_takes_no_command_down(command, tmp_path, file, name):
    result(tmp_path, "good")
    bad = tmp_path / file
    bad.parent.mkdir(parents=True)
    if name == "pipe":
        os.mkfifo(bad)
    elif name == "link":
        bad.symlink_to("nowhere")
    elif name == "folder":
        bad.mkdir()
    else:
        bad.write_text(BAD[name])
    for action in ("status", "collect", "cancel"):
        code, out, err = command(action, str(tmp_path))
        assert code in ((1,) if action == "collect" and file.startswith("a/") else (0,))
        assert "done" in out or action == "cancel"
        if action != "collect":
            assert bad.name in out + err
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        file.startswith("sweeps")
        or ("a/result.json" if "result" in file else "a has no rows yet") in page
    )
    with (tmp_path / "results.csv").open(newline="") as handle:
        assert [row["key"] for row in csv.DictReader(handle)] == ["key-good"]


HALF_TYPED = {
    "time": [10**400, 1e300, True, "soon", [], -1e300],
    "pid": [10**400, -1, True, "x", None, 1e300],
    "started": [10**400, "x", None],
    "host": [3, None, []],
    "stage": [3, ["a"], None],
    "reason": [3, {}, None],
    "progress": [3, [1], {"label": {}, "done": 10**300}],
    "job": [3, ["7"], {"a": 1}],
}


@pytest.mark.parametrize("field", HALF_TYPED)
@pytest.mark.parametrize("state", ["running", "failed", "dancing"])
def test_a_half_typed_status_is_shown_as_far_as_it_goes(command, tmp_path, field, state):
    for i, value in enumerate(HALF_TYPED[field]):
        status(tmp_path, f"cell{i}", state, **{field: value})
    for action in ("status", "cancel"):
        code, out, _ = command(action, str(tmp_path))
        assert code == 0
        assert action == "cancel" or "cell0" in out
