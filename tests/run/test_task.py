"""From a composed config to a file that a job reads, and back to the same cell."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from rerail.config import secrets as holding
from rerail.config.presets import config_root
from rerail.errors import InputError
from rerail.run import task


@pytest.fixture
def composed(tmp_path, monkeypatch):
    monkeypatch.setenv("RERAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(task.Outcome, "failed", False)
    (tmp_path / "text.txt").write_text("A quick brown fox jumps over the lazy dog. " * 400)

    def make(*words: str):
        GlobalHydra.instance().clear()
        paths = f"[{tmp_path / 'text.txt'}]"
        fixed = [f"out={tmp_path / 'out'}", "distill=none", "trainer=cpu", "evaluation=file"]
        fixed += [f"evaluation.texts.file.sources.0.paths={paths}", "calibration=files"]
        fixed += [f"calibration.sources.0.paths={paths}", "samples.count=8", "calibration.block=16"]
        fixed += ["evaluation.texts.file.samples=2", "evaluation.texts.file.block=16"]
        fixed += ["evaluation.new_tokens=2"]
        with initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
            return compose("config", [*fixed, *words], return_hydra_config=True)

    return make


def read_back(held):
    return yaml.safe_load(yaml.safe_dump(held))


def test_what_a_job_reads_is_the_cell_that_was_described_and_it_is_done_once(composed, tmp_path):
    described = task.describe(composed("seed=3"))
    assert (described.state, described.reason) == ("open", "")
    assert described.folder.endswith(described.key[:8])
    held = read_back(described.held)
    assert held["names"]["compressor"] == "reap"
    assert held["command"].startswith("rerail distill=none")
    assert task.run(held) == ("done", "")
    folder = tmp_path / "out" / described.folder
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    again = task.describe(composed("seed=3"))
    assert (again.state, again.key) == ("done", described.key)


def test_a_choice_that_cannot_be_used_is_a_row_before_anything_runs(composed, tmp_path):
    for words, state, said in (
        (["ratio.removed=1.5"], "failed", "outside"),
        (["ratio.removed=0.9"], "not_applicable", "allowed ratios"),
        (["calibration.sources.0.paths=[/nowhere.txt]"], "failed", "nowhere"),
    ):
        described = task.describe(composed(*words))
        assert described.state == state
        assert said in described.reason
        [row] = json.loads((tmp_path / "out" / described.folder / "result.json").read_text())
        assert (row["status"], row["reason"]) == (state, described.reason)


def test_choices_that_read_back_as_others_are_not_run(composed):
    held = read_back(task.describe(composed()).held)
    held["config"]["seed"] = 4
    with pytest.raises(InputError, match="submit the sweep again"):
        task.run(held)


def test_a_failing_cell_leaves_its_traceback_until_it_succeeds(composed, tmp_path, monkeypatch):
    from rerail import api

    described = task.describe(composed())
    with monkeypatch.context() as patch:
        patch.setattr(api, "make_plan", lambda *_: 1 / 0)
        state, reason = task.run(described.held)
    assert (state, reason) == ("failed", "ZeroDivisionError: division by zero")
    folder = tmp_path / "out" / described.folder
    held = json.loads((folder / "status.json").read_text())
    assert (held["state"], held["stage"], held["pid"]) == ("failed", "plan", os.getpid())
    assert "make_plan" in (folder / "traceback.txt").read_text()
    assert task.run(described.held)[0] == "done"
    assert not (folder / "traceback.txt").exists()


def test_a_cell_that_another_process_finished_meanwhile_is_done(composed, tmp_path, monkeypatch):
    from rerail import api

    described = task.describe(composed())
    plan = api.plan

    def late(*_, **__):
        with monkeypatch.context() as patch:
            patch.setattr(api, "plan", plan)
            assert task.run(described.held)[0] == "done"
        raise FileNotFoundError("what the other one has removed at its end")

    monkeypatch.setattr(api, "plan", late)
    assert task.run(described.held) == ("done", "")
    folder = tmp_path / "out" / described.folder
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert {row["status"] for row in json.loads((folder / "result.json").read_text())} == {"done"}


RUN = "import sys, yaml; from rerail.run.task import run"
RUN += "; print(run(yaml.safe_load(open(sys.argv[1]))))"
VOLATILE = ("host", "time", "seconds", "evaluation_seconds", "peak_memory", "choices")


@pytest.mark.slow
def test_two_processes_on_the_same_cell_both_end_well_with_the_same_rows(composed, tmp_path):
    words = ("distill=router_kd", "++distill.batch_size=4", "++distill.epochs=8")
    described = task.describe(composed(*words, "samples.count=16"))
    (tmp_path / "held.yaml").write_text(yaml.safe_dump(described.held))
    command = [sys.executable, "-c", RUN, str(tmp_path / "held.yaml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as in this process
    children = []
    for name in "ab":
        with (tmp_path / name).open("w") as file:
            children.append(subprocess.Popen(command, stdout=file, stderr=file, env=env))
    codes = [child.wait(timeout=200) for child in children]
    said = [(tmp_path / name).read_text() for name in "ab"]
    assert codes == [0, 0], said
    assert all("('done', '')" in one for one in said), said
    folder = tmp_path / "out" / described.folder
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    left = [p.name for p in folder.rglob("*") if p.suffix in (".tmp", ".old", ".ckpt")]
    assert left == []
    alone = {
        **described.held,
        "config": {**described.held["config"], "out": str(tmp_path / "other")},
    }
    assert task.run(alone) == ("done", "")
    rows, others = (
        [{n: v for n, v in row.items() if n not in VOLATILE} for row in json.loads(text)]
        for text in (
            (at / "result.json").read_text() for at in (folder, tmp_path / "other" / folder.name)
        )
    )
    assert rows == others


def test_a_preempted_cell_is_not_called_failed(composed, tmp_path, monkeypatch):
    from rerail import api

    described = task.describe(composed())

    def preempted(*_, **__):
        raise SystemExit(-1)  # as submitit does after it has requeued the job

    monkeypatch.setattr(api, "plan", preempted)
    with pytest.raises(SystemExit):
        task.run(described.held)
    folder = tmp_path / "out" / described.folder
    held = json.loads((folder / "status.json").read_text())
    assert (held["state"], held["stage"]) == ("running", "plan")
    assert not (folder / "result.json").exists()


def test_a_secret_stays_in_the_environment_and_nothing_else_changes(monkeypatch):
    monkeypatch.setenv("HUB_API_KEY", "s3cret-value")
    config = {"url": "https://s3cret-value@hub", "prompt": "${seed} costs $5", "n": 1e-5}
    held = holding.without_secret_values({"command": "rerail x=s3cret-value", "config": config})
    assert "s3cret-value" not in yaml.safe_dump(held)
    from omegaconf import OmegaConf

    back = OmegaConf.to_container(OmegaConf.create(read_back(held)["config"]), resolve=True)
    assert back == config


def test_a_secret_that_was_typed_is_refused():
    with pytest.raises(InputError, match=r"model\.api_key is a secret") as refused:
        holding.without_secret_values({"config": {"model": {"api_key": "typed-by-hand"}}})
    assert "typed-by-hand" not in str(refused.value)
