"""Streaming to W&B: what is read back is what the rows say, nothing twice, and no secret in it."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rerail.tracking.wandb as mirror
from rerail.config.secrets import without_secrets
from rerail.run.mirror import Live
from rerail.run.results import COLUMNS, write_rows
from rerail.tracking.journal import Journal
from rerail.tracking.records import flat, point_record, records
from rerail.tracking.wandb import WandbMirror, mode_of, server
from result_rows import Row, cell, failed_cell

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no mode and no settings of whoever runs the tests."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(mirror, "_offline", [])


def read_back(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the one run in a folder."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(run)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in out.splitlines()]


def history_of(read: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was logged, step by step."""
    actual = [item["history"]["item"] for item in read if item["type"] == "history"]
    assert [item["_step"] for item in actual] == list(range(len(actual)))
    return [{k: v for k, v in item.items() if k[0] != "_"} for item in actual]


def logged(rows: list[Row]) -> list[dict[str, Any]]:
    return [record for row in rows for _, record in records(row)]


def curve_of(rows: list[Row]) -> list[dict[str, Any]]:
    return rows[-1]["curve"]


def stream(live: Live, rows: list[Row]) -> None:
    """Show a cell as it runs: stages as they end, the curve before the repaired row."""
    for row in rows:
        for point in row["curve"] or []:
            live.point({"step": point["step"] + 1, "batch_kl": 0.5})
            live.point(point)
        live.row(row)


def choices(rows: list[Row]) -> dict[str, Any]:
    return {"choices": rows[0]["choices"], "revision": rows[0]["revision"]}


def test_an_offline_run_reads_back_as_result_json_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    rows = cell()
    rows[0]["tasks"] = [{"task": "t", "metric": "acc", "value": 0.5, "se": 0.1, "n": 9}]
    folder = tmp_path / "a-cell"
    secrets = {"hub": {"token": "abc"}, "where": "https://u:hf_verysecretvalue@host"}
    with caplog.at_level(logging.WARNING):
        live = WandbMirror().open("k", "fine_vs_coarse", {**choices(rows), **secrets}, folder)
    assert "no key is known" in caplog.text
    stream(live, rows)
    rows[2]["disk_bytes"] = 123
    write_rows(folder, rows)
    live.close("done", rows)

    read = read_back(folder)
    (run,) = [item["run"] for item in read if item["type"] == "run"]
    assert (run["project"], run["run_group"]) == ("rerail", "fine_vs_coarse")
    assert (run["job_type"], run["display_name"]) == ("reap", "a-cell")
    entry = run["config"]["update"]
    assert entry["revision"] == "0123456789ab"
    assert entry["claim"] == "fine_vs_coarse"
    assert entry["choices"]["calibration"] == {"samples": 256, "seed": 0}
    (update,) = [item["config"]["update"] for item in read if item["type"] == "config"]
    assert update == flat(rows[0])
    assert update.items() >= {"compressor": "reap", "granularity": "fine", "ratio": 0.5}.items()

    history = history_of(read)
    merged = {name: value for item in history for name, value in item.items()}
    for row in json.loads((folder / "result.json").read_text()):
        for name, column in COLUMNS.items():
            if column.kind not in (dict, list):
                assert merged.get(f"{row['stage']}/{name}") == row[name], name
        for layer in row["layers"] or []:
            plain = {n: v for n, v in layer.items() if n != "load"}
            assert {f"{row['stage']}/layers/{n}": v for n, v in plain.items()} in history
    points = [i for i in history if "repair/val_kl" in i]
    assert points == [point_record(point)[1] for point in rows[2]["curve"]]
    steps = [i["repair/step"] for i in history if "repair/batch_kl" in i]
    assert steps == [point["step"] + 1 for point in rows[2]["curve"]]
    assert history[-1] == {"repaired/disk_bytes": 123}
    assert {"teacher/tasks/t/acc": 0.5, "teacher/tasks/t/acc_se": 0.1}.items() <= merged.items()
    everything = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert b"hf_verysecretvalue" not in everything
    assert b'"abc"' not in everything
    assert not list(folder.rglob("wandb-metadata.json"))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_wandb import cell, choices, stream
from rerail.tracking.wandb import WandbMirror
rows = cell()
folder = Path(sys.argv[1])
live = WandbMirror().open("k", None, choices(rows), folder)
live.row(rows[0])
live.row(rows[1])
for point in rows[2]["curve"][:4]:
    live.point(point)
assert not live.lost
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_cell_goes_on_in_one_run_and_logs_nothing_twice(tmp_path: Path) -> None:
    folder = tmp_path / "a-cell"
    command = [sys.executable, "-c", KILLED, str(folder), *map(str, Path(__file__).parents[:2])]
    own = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}  # a client of its own
    assert subprocess.run(command, check=False, env=own).returncode == -9
    (first,) = (folder / "wandb").glob("offline-run-*")
    with (folder / "wandb" / "records.jsonl").open("a") as journal:
        journal.write('{"name": "half a li')
    rows = [{**row, "time": "2026-02-03T04:05:06+00:00", "host": "node-2"} for row in cell()]
    live = WandbMirror().open("k", None, choices(rows), folder)
    for row in rows:
        live.row(row)
    live.close("done", rows)
    read = read_back(folder)
    assert not first.exists()
    assert {item["run"]["run_id"] for item in read if item["type"] == "run"} == {"k"}
    history = history_of(read)
    for name in ("teacher/nll", "compressed/nll", "repaired/nll", "teacher/seconds"):
        assert sum(name in item for item in history) == 1
    points = [i for i in history if "repair/val_kl" in i]
    assert points == [point_record(point)[1] for point in curve_of(rows)]
    merged = {name: value for item in history for name, value in item.items()}
    for row in rows:
        assert merged[f"{row['stage']}/host"] == "node-2"
        assert merged[f"{row['stage']}/time"] == row["time"]


def test_a_cell_that_was_shown_to_its_end_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "wandb" / "records.jsonl")
    journal.add("teacher", {"teacher/nll": 1.0})
    journal.close()
    monkeypatch.setattr(mirror, "_init", lambda *_, **__: pytest.fail("a run was begun"))
    rows = cell()
    live = WandbMirror().open("k", None, {}, tmp_path)
    stream(live, rows)
    live.close("done", rows)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    stream(WandbMirror().open("k", None, {}, tmp_path / "other"), rows)


class Online:
    """Stands for a run whose server has some steps already."""

    offline = False

    def __init__(self, step: int, folder: Path, broken_at: int | None = None):
        self.step, self.broken_at = step, broken_at
        self.dir = str(folder / "wandb" / "run-now-k" / "files")
        self.sent: list[tuple[int, dict[str, Any]]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.code: int | None = None

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, record: dict[str, Any], step: int, commit: bool) -> None:
        if step == self.broken_at:
            raise OSError("no space left on device")
        self.sent.append((step, record))

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)

    def finish(self, exit_code: int) -> None:
        self.code = exit_code


class Config(dict):
    def update(self, values: Any, allow_val_change: bool) -> None:
        super().update(values)


def opened(run: Online, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Live:
    run.config = Config()
    monkeypatch.setattr(mirror, "_init", lambda *_, **__: run)
    return WandbMirror().open("k", None, {}, folder)


def test_online_the_server_is_sent_what_it_lacks_under_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = cell()
    first = Online(0, tmp_path)
    stream(opened(first, tmp_path, monkeypatch), rows[:2])
    assert [step for step, _ in first.sent] == list(range(10))
    again = Online(8, tmp_path)  # the last two records never arrived
    live = opened(again, tmp_path, monkeypatch)
    stream(live, rows)
    write_rows(tmp_path, rows)
    live.close("done", rows)
    assert again.sent[:2] == first.sent[8:]
    assert [step for step, _ in again.sent] == list(range(8, 8 + len(again.sent)))
    assert again.code == 0
    assert again.summary == {"status": "done"}


def test_online_tables_and_plan_are_an_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "value-of-the-key")
    rows = cell()
    rows[1]["reason"] = "value-of-the-key"
    run = Online(0, tmp_path)
    live = opened(run, tmp_path, monkeypatch)
    write_rows(tmp_path, rows)
    (tmp_path / "plan.json").write_text("{}")
    live.close("done", rows)
    (artifact,) = run.artifacts
    entries = artifact.manifest.entries
    assert {"result.json", "plan.json"} <= entries.keys()

    def table(name: str) -> Any:
        return json.loads(Path(entries[f"{name}.table.json"].local_path).read_text())

    entry = table("rows")
    for row, values in zip(rows, entry["data"], strict=True):
        actual = dict(zip(entry["columns"], values, strict=True))
        hidden = {"reason": "(hidden)"} if row["reason"] else {}
        assert actual == {name: row[name] for name in actual} | hidden
    assert len(table("layers")["data"]) == sum(len(row["layers"] or []) for row in rows)
    continuations = table("continuations")["data"]
    assert continuations == [[row["stage"], row["prompt"], row["samples_text"]] for row in rows]


def test_a_mirror_that_breaks_warns_once_and_the_next_one_has_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = cell()
    with caplog.at_level(logging.WARNING):
        live = opened(Online(0, tmp_path, broken_at=3), tmp_path, monkeypatch)
        stream(live, rows)
        live.close("done", rows)
    (message,) = caplog.records
    assert "no space left" in message.getMessage()
    whole = Online(0, tmp_path)
    live = opened(whole, tmp_path, monkeypatch)
    stream(live, rows)
    live.close("done", rows)
    sent = [record for _, record in whole.sent if "repair/batch_kl" not in record]
    assert sent == logged(rows)


def test_a_failed_cell_ends_as_failed_with_its_reason_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Online(0, tmp_path)
    live = opened(run, tmp_path, monkeypatch)
    live.row(cell()[0])
    live.close("failed", reason="ValueError: why")
    assert (run.code, run.summary) == (1, {"status": "failed", "reason": "ValueError: why"})
    assert not Journal(tmp_path / "wandb" / "records.jsonl").closed


def test_a_client_that_does_not_begin_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        live = WandbMirror(mode="sideways").open("k", None, {}, tmp_path)
        stream(live, cell())
        live.close("done", cell())
    assert [record.getMessage()[:23] for record in caplog.records] == ["W&B has no full copy of"]


@pytest.mark.slow
def test_a_server_that_does_not_answer_leaves_offline_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(mirror, "PATIENCE", 3.0)
    rows = cell()
    with caplog.at_level(logging.WARNING):
        for name in ("one", "two"):
            live = WandbMirror().open(f"k-{name}", None, choices(rows), tmp_path / name)
            live.row(rows[0])
            live.close("done", rows[:1])
    (message,) = [item.getMessage() for item in caplog.records if item.name == mirror.__name__]
    assert "http://127.0.0.1:9 cannot be used" in message
    assert "wandb sync" in message
    for name in ("one", "two"):
        assert history_of(read_back(tmp_path / name)) == logged(rows[:1])
    assert not any(KEY.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("asked", "environment", "netrc", "mode"),
    [
        (None, {}, "", "offline"),
        (None, {"WANDB_API_KEY": KEY}, "", "online"),
        (None, {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, "", None),
        ("offline", {"WANDB_MODE": "online", "WANDB_API_KEY": KEY}, "", "offline"),
        (None, {}, f"machine wandb.example.org login user password {KEY}", "online"),
        (None, {}, f"machine elsewhere.org login user password {KEY}", "offline"),
        (None, {}, "no netrc at all", "offline"),
    ],
)
def test_the_mode_follows_the_environment_and_needs_a_key_to_be_online(
    asked: str | None,
    environment: dict[str, str],
    netrc: str,
    mode: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    assert mode_of(asked, "https://wandb.example.org") == mode


def test_the_server_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert server() == "https://wandb.example.org"


def test_offline_for_want_of_a_key_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert [mode_of(None, "https://a.org") for _ in range(3)] == ["offline"] * 3
    assert len(caplog.records) == 1


def test_secrets_are_hidden_by_name_and_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "value-of-the-key")
    config = {
        "api_key": "x",
        "hub_token": "x",
        "nested": [{"password": "x"}, "see value-of-the-key here"],
        "new_tokens": 48,
        "tokenizer": "bpe",
        "command": "rerail seed=0",
    }
    assert without_secrets(config) == {
        "api_key": "(hidden)",
        "hub_token": "(hidden)",
        "nested": [{"password": "(hidden)"}, "see (hidden) here"],
        "new_tokens": 48,
        "tokenizer": "bpe",
        "command": "rerail seed=0",
    }


def test_a_failed_row_is_a_record_with_its_reason() -> None:
    ((name, record),) = records(failed_cell(reason="why"))
    assert name == "cell"
    assert record == {
        "cell/status": "failed",
        "cell/reason": "why",
        "cell/key": "bad0",
        "cell/model": "tiny_fine",
        "cell/compressor": "reap",
        "cell/ratio": 0.9,
        "cell/seed": 0,
    }


def test_a_setting_is_what_only_seeds_differ_in() -> None:
    def setting(**known: Any) -> str:
        return flat(cell(**known)[2])["setting"]

    assert setting() == setting(seed=1)
    assert setting().startswith("reap, ratio 0.5, 256 samples, fine ")
    others = [{"ratio": 0.25}, {"samples": 64}, {"model": "tiny_coarse"}, {"texts": {"docs": 9}}]
    assert len({setting(), *(setting(**known) for known in others)}) == 5


def test_the_client_is_imported_by_this_module_only_and_only_to_log() -> None:
    source = Path(mirror.__file__).parents[1]
    naming = [p.name for p in source.rglob("*.py") if "import wandb\n" in p.read_text("utf-8")]
    assert naming == ["wandb.py"]
    code = "import sys, rerail.tracking.wandb as w; w.WandbMirror(); print('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
