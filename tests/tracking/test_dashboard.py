"""The W&B workspace and report, as their specification."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rerail.cli.dashboard import main
from rerail.config.presets import config_root
from rerail.tracking import dashboard
from rerail.tracking.records import FLAT, records

GOLDEN = Path(__file__).parents[1] / "golden" / "dashboard.json"
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL")
    for name in (*names, "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)


def numbered(value: Any, seen: dict[str, str]) -> Any:
    """Return a specification whose random ids are numbers in the order of their coming."""
    if isinstance(value, dict):
        ids = {n: seen.setdefault(v, f"id{len(seen)}") for n, v in value.items() if _random(n, v)}
        return {n: ids.get(n) or numbered(v, seen) for n, v in value.items()}
    return [numbered(item, seen) for item in value] if isinstance(value, list) else value


def _random(name: str, value: Any) -> bool:
    return name in ("id", "__id__") and bool(re.fullmatch("[0-9a-z]{8,13}", str(value)))


def spec(*words: str) -> Any:
    assert main(["--entity", "team", "--spec", "spec.json", *words]) == 0
    return json.loads(Path("spec.json").read_text())


def panels_of(part: Any) -> list[dict[str, Any]]:
    """Return every panel in a specification."""
    if isinstance(part, dict):
        own = [part] if "viewType" in part else []
        return own + [p for value in part.values() for p in panels_of(value)]
    return [p for item in part for p in panels_of(item)] if isinstance(part, list) else []


def test_the_specification_is_the_golden_one(regenerate_golden: bool) -> None:
    actual = numbered(spec("--claim", "fine_vs_coarse"), {})
    if regenerate_golden:
        GOLDEN.write_text(json.dumps(actual, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert actual == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_both_show_the_same_panels_over_columns_that_the_logger_sends() -> None:
    from result_rows import cell

    made = spec()
    workspace, report = panels_of(made["workspace"]), panels_of(made["report"])
    assert [p["config"] for p in workspace] == [p["config"] for p in report]
    titles = [p["config"]["chartTitle"] for p in workspace]
    for words in ("fine against coarse", "NLL against bytes", "removed share", "blocks"):
        assert any(words in title for title in titles)
    sent = {name for row in cell() for _, record in records(row) for name in record}
    sent |= {f"config:{name}.value" for name in (*FLAT, "setting", "revision")}
    sent |= {"repair/batch_kl"}
    used = set()
    for config in (p["config"] for p in workspace):
        used |= {config.get("xAxis"), config.get("yAxis"), *config.get("metrics", ())} - {None}
        used |= {f"config:{config['groupBy']}"} if "groupBy" in config else set()
    (runs,) = made["workspace"]["spec"]["section"]["runSets"]
    used |= set(runs["runFeed"]["columnOrder"]) - {"run:displayName"}
    assert len(used) > 15
    assert {name.removeprefix("summary:") for name in used} <= sent


def test_a_claim_shows_its_own_runs_only() -> None:
    def filters(made: Any) -> list[tuple[str, str]]:
        (runs,) = made["workspace"]["spec"]["section"]["runSets"]
        return [(item["key"]["name"], item["value"]) for item in runs["filters"]["filters"]]

    assert filters(spec()) == [("state", "finished")]
    claim = [("state", "finished"), ("group", "learning_rate")]
    assert filters(spec("--claim", "learning_rate")) == claim


def test_no_secret_is_in_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert KEY not in json.dumps(spec())


def test_an_unknown_claim_lists_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--entity", "team", "--claim", "fine", "--spec", "spec.json"]) == 2
    message = capsys.readouterr().err
    claims = sorted(path.stem for path in (config_root() / "experiments").glob("*.yaml"))
    assert f"--claim fine does not exist; allowed: {', '.join(claims)}\n" in message
    assert "fine_vs_coarse" in claims
    assert not Path("spec.json").exists()


def test_without_an_entity_or_a_key_one_sentence_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    assert "--entity is missing" in capsys.readouterr().err
    assert main(["--entity", "team"]) == 2
    message = capsys.readouterr().err
    assert "no W&B key is known" in message
    assert message.count("\n") == 1
    assert not list(Path().glob("*.json"))


class Saved:
    def __init__(self, *options: Any, **named: Any):
        self.options, self.named = options, named

    def save(self) -> "Saved":
        return self

    @property
    def url(self) -> str:
        return "https://wandb.example.org/" + "/".join(map(str, self.options))


def test_with_a_key_both_are_saved_and_their_addresses_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(dashboard, "workspace", Saved)
    monkeypatch.setattr(dashboard, "report", Saved)
    assert main(["--entity", "team", "--claim", "fine_vs_coarse"]) == 0
    out = capsys.readouterr().out
    assert out == "https://wandb.example.org/team/rerail/fine_vs_coarse\n" * 2


class Refused:
    def save(self) -> None:
        raise ConnectionError("no route to host")


def test_a_server_that_cannot_be_used_leaves_the_specification(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    whole = dashboard.specification("team", "rerail")
    monkeypatch.setattr(dashboard, "workspace", lambda *_: Refused())
    monkeypatch.setattr(dashboard, "report", lambda *_, **__: Refused())
    monkeypatch.setattr(dashboard, "specification", lambda *_: whole)
    assert main(["--entity", "team"]) == 2
    assert capsys.readouterr().err == (
        "rerail-dashboard: W&B at https://wandb.example.org did not save the dashboard of "
        "team/rerail (ConnectionError: no route to host); its specification is in "
        "rerail-dashboard.json\n"
    )
    assert json.loads(Path("rerail-dashboard.json").read_text()) == whole
