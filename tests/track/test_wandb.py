"""The W&B mirror, offline: what is read back is what the rows say, and no secret is in it."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from result_rows import cell, failed_cell

import rerail.track.wandb as mirror
from rerail.track.results import COLUMNS, Row
from rerail.track.wandb import WandbMirror, records, without_secrets

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no mode and no settings of whoever runs the tests."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(mirror, "_said", set())


def read_back(folder: Path) -> list[dict]:
    """Return the records of the one offline run in a folder."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(run)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in out.splitlines()]


def test_an_offline_run_reads_back_as_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    rows: list[Row] = cell()
    rows[0]["tasks"] = [{"task": "t", "metric": "acc", "value": 0.5, "se": 0.1, "n": 9}]
    config = {"seed": 0, "hub": {"token": "abc"}, "where": "https://u:hf_verysecretvalue@host"}
    folder = tmp_path / "a-cell"
    folder.mkdir()
    with caplog.at_level(logging.WARNING):
        WandbMirror(claim="fine_vs_coarse").log_rows(rows, config, folder)
    assert "no key is known" in caplog.text
    read = read_back(folder)
    (run,) = [one["run"] for one in read if one["type"] == "run"]
    assert (run["project"], run["run_group"]) == ("rerail", "fine_vs_coarse/tiny_fine")
    assert (run["job_type"], run["display_name"]) == ("reap", "a-cell")
    held = run["config"]["update"]
    assert (held["seed"], held["revision"]) == (0, "0123456789ab")
    history = [one["history"]["item"] for one in read if one["type"] == "history"]
    history = [{k: v for k, v in item.items() if k[0] != "_"} for item in history]
    assert history == list(records(rows))
    for row in rows:
        (stage,) = [item for item in history if f"{row['stage']}/nll" in item]
        for name, column in COLUMNS.items():
            if column.kind not in (dict, list):
                assert stage.get(f"{row['stage']}/{name}") == row[name], name
    points = [{k.split("/")[1]: v for k, v in i.items()} for i in history if "repair/step" in i]
    assert points == [{k: v for k, v in p.items() if v is not None} for p in rows[2]["curve"]]
    assert {"teacher/tasks/t/acc": 0.5, "teacher/tasks/t/acc_se": 0.1}.items() <= history[
        11
    ].items()
    everything = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert b"hf_verysecretvalue" not in everything
    assert b'"abc"' not in everything
    assert not list(folder.rglob("wandb-metadata.json"))


@pytest.mark.parametrize(
    ("given", "environment", "netrc", "mode"),
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
    given: str | None,
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
    assert WandbMirror(mode=given)._mode("https://wandb.example.org") == mode


def test_offline_for_want_of_a_key_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert [WandbMirror()._mode("https://a.org") for _ in range(3)] == ["offline"] * 3
    assert len(caplog.records) == 1


def test_a_mirror_that_fails_warns_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        WandbMirror(mode="sideways").log_rows(cell(), {}, tmp_path)
    assert "W&B has no copy of" in caplog.text


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


def test_a_failed_cell_is_a_record_with_its_reason() -> None:
    (record,) = records([failed_cell(reason="why")])
    assert record == {
        "cell/status": "failed",
        "cell/reason": "why",
        "cell/key": "bad0",
        "cell/model": "tiny_fine",
        "cell/compressor": "reap",
        "cell/ratio": 0.9,
        "cell/seed": 0,
    }


def test_the_client_is_imported_by_this_module_only_and_only_to_log() -> None:
    source = Path(mirror.__file__).parents[1]
    naming = [p.name for p in source.rglob("*.py") if "import wandb" in p.read_text("utf-8")]
    assert naming == ["wandb.py"]
    code = "import sys, rerail.track.wandb as w; w.WandbMirror(); print('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
