"""A real cell streamed to W&B offline, read back, and compared with its result.json."""

import json
from pathlib import Path

import pytest
import test_cell_runs
from test_cell_runs import Killed

from rerail.run import pipeline as runner
from rerail.run.results import COLUMNS
from rerail.run.status import Status
from rerail.tracking.journal import Journal
from rerail.tracking.wandb import WandbMirror

cell, model_folder = test_cell_runs.cell, test_cell_runs.model_folder


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def journal_of(folder: Path) -> Journal:
    return Journal(folder / "wandb" / "records.jsonl")


def check(folder: Path) -> None:
    """Compare what was sent with result.json, stage by stage and column by column."""
    sent = journal_of(folder)
    assert sent.closed
    merged = {name: value for record in sent.records.values() for name, value in record.items()}
    rows = json.loads((folder / "result.json").read_text())
    for row in rows:
        for name, column in COLUMNS.items():
            if column.kind not in (dict, list):
                assert merged.get(f"{row['stage']}/{name}") == row[name], name
        for layer in row["layers"] or []:
            content = sent.records[f"{row['stage']}/layers/{layer['layer']}"]
            plain = {n: v for n, v in layer.items() if n != "load"}
            assert content == {f"{row['stage']}/layers/{n}": v for n, v in plain.items()}
            assert sum(share or 0 for share in layer["load"]) == pytest.approx(1, abs=1e-4)
    points = [r for n, r in sent.records.items() if n.startswith("repair/validation")]
    assert points == [{f"repair/{n}": v for n, v in p.items()} for p in rows[2]["curve"]]
    steps = [r["repair/step"] for n, r in sent.records.items() if n.startswith("repair/batch")]
    assert steps == list(range(1, int(rows[2]["curve"][-1]["step"]) + 1))


def test_a_cell_is_shown_while_it_runs_and_once(cell, tmp_path, monkeypatch):
    one = cell()
    folder = tmp_path / "out" / one.folder
    seen: dict[str, list[str]] = {}
    write = Status.write

    def watched(self, state, stage="", reason=""):
        write(self, state, stage, reason)
        seen[stage] = list(journal_of(folder).records)

    monkeypatch.setattr(Status, "write", watched)
    runner.run_cell(one, tmp_path / "out", WandbMirror())
    assert seen["evaluate compressed"] == ["teacher", "teacher/layers/0", "teacher/layers/1"]
    assert seen["repair"][-1] == "compressed/layers/1"
    assert seen["evaluate repaired"][-1].startswith("repair/validation/")
    check(folder)
    (run,) = (folder / "wandb").glob("offline-run-*")
    runner.run_cell(one, tmp_path / "out", WandbMirror())
    assert list((folder / "wandb").glob("offline-run-*")) == [run]


def test_a_cell_killed_in_its_repair_goes_on_in_the_same_run(cell, tmp_path, monkeypatch):
    one = cell()
    folder = tmp_path / "out" / one.folder
    write = Status.write

    def die(self, state, stage="", reason=""):
        write(self, state, stage, reason)
        if stage == "evaluate repaired":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Status, "write", die)
        with pytest.raises(Killed):
            runner.run_cell(one, tmp_path / "out", WandbMirror())
    assert not journal_of(folder).closed
    runner.run_cell(one, tmp_path / "out", WandbMirror())
    check(folder)
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1


def test_a_cell_that_was_done_before_is_shown_afterwards(cell, tmp_path):
    one = cell("distill=none")
    rows = runner.run_cell(one, tmp_path / "out")
    runner.run_cell(one, tmp_path / "out", WandbMirror())
    sent = journal_of(tmp_path / "out" / one.folder)
    assert sent.closed
    assert sent.records["compressed"]["compressed/nll"] == rows[1]["nll"]
