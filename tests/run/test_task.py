"""From a composed config to a file that a job reads, and back to the same cell."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from rerail.config.presets import config_root
from rerail.config.secrets import escaped, without_secrets
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


@pytest.fixture
def read_back(tmp_path):
    return lambda cell: task.SweepCell.load(cell.save(tmp_path / "cell.yaml"))


def test_what_a_job_reads_is_the_cell_that_was_described_and_it_is_done_once(
    composed, read_back, tmp_path
):
    described = task.describe(composed("seed=3"))
    assert (described.state, described.reason) == ("open", "")
    assert described.folder.endswith(described.key[:8])
    cell = read_back(described)
    assert cell.names["compressor"] == "reap"
    assert cell.command.startswith("rerail distill=none")
    assert task.run(cell) == ("done", "")
    folder = tmp_path / "out" / described.folder
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    again = task.describe(composed("seed=3"))
    assert (again.state, again.key) == ("done", described.key)


def test_a_choice_that_cannot_be_used_is_a_row_before_anything_runs(composed, tmp_path):
    for words, state, message in (
        (["ratio.removed=1.5"], "failed", "outside"),
        (["ratio.removed=0.9"], "not_applicable", "allowed ratios"),
        (["calibration.sources.0.paths=[/nowhere.txt]"], "failed", "nowhere"),
    ):
        described = task.describe(composed(*words))
        assert described.state == state
        assert message in described.reason
        [row] = json.loads((tmp_path / "out" / described.folder / "result.json").read_text())
        assert (row["status"], row["reason"]) == (state, described.reason)


def test_choices_that_read_back_as_others_are_not_run(composed, read_back):
    cell = read_back(task.describe(composed()))
    other = replace(cell, config={**cell.config, "seed": 4})
    with pytest.raises(InputError, match="submit the sweep again"):
        task.run(other)


def test_a_failing_cell_leaves_its_traceback_until_it_succeeds(composed, tmp_path, monkeypatch):
    from rerail import api

    described = task.describe(composed())
    with monkeypatch.context() as patch:
        patch.setattr(api, "make_plan", lambda *_, **__: 1 / 0)
        state, reason = task.run(described)
    assert (state, reason) == ("failed", "ZeroDivisionError: division by zero")
    folder = tmp_path / "out" / described.folder
    content = json.loads((folder / "status.json").read_text())
    assert (content["state"], content["stage"], content["pid"]) == ("failed", "plan", os.getpid())
    assert "make_plan" in (folder / "traceback.txt").read_text()
    assert task.run(described)[0] == "done"
    assert not (folder / "traceback.txt").exists()


@pytest.mark.parametrize("names", [("status.json",), ("status.json", "result.json")])
def test_a_failure_that_cannot_be_recorded_is_a_row_all_the_same(composed, tmp_path, names):
    described = task.describe(composed())
    folder = tmp_path / "out" / described.folder
    folder.mkdir(parents=True)
    for name in names:
        os.mkfifo(folder / name)
    state, reason = task.run(described)
    assert state == "failed"
    assert f"{folder / 'status.json'} is a pipe" in reason
    assert (folder / "status.json").is_fifo()


def test_a_cell_that_another_process_finished_meanwhile_is_done(composed, tmp_path, monkeypatch):
    from rerail import api
    from rerail.run import pipeline

    # as on a file system that knows no locks
    monkeypatch.setattr(pipeline, "only_process", lambda _: contextlib.nullcontext())
    described = task.describe(composed())
    plan = api.plan

    def late(*_, **__):
        with monkeypatch.context() as patch:
            patch.setattr(api, "plan", plan)
            assert task.run(described)[0] == "done"
        raise FileNotFoundError("what the other one has removed at its end")

    monkeypatch.setattr(api, "plan", late)
    assert task.run(described) == ("done", "")
    folder = tmp_path / "out" / described.folder
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert {row["status"] for row in json.loads((folder / "result.json").read_text())} == {"done"}


RUN = "import sys; from pathlib import Path; from rerail.run.task import SweepCell, run"
RUN += "; print(run(SweepCell.load(Path(sys.argv[1]))))"
VOLATILE = ("host", "time", "seconds", "evaluation_seconds", "peak_memory", "choices")


@pytest.mark.slow
def test_two_processes_on_the_same_cell_both_end_well_with_the_same_rows(composed, tmp_path):
    words = ("distill=router_kd", "++distill.batch_size=4", "++distill.epochs=8")
    described = task.describe(composed(*words, "samples.count=16"))
    command = [sys.executable, "-c", RUN, str(described.save(tmp_path / "cell.yaml"))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as in this process
    children = []
    for name in "ab":
        with (tmp_path / name).open("w") as file:
            children.append(subprocess.Popen(command, stdout=file, stderr=file, env=env))
    codes = [child.wait(timeout=200) for child in children]
    message = [(tmp_path / name).read_text() for name in "ab"]
    assert codes == [0, 0], message
    assert all("('done', '')" in one for one in message), message
    folder = tmp_path / "out" / described.folder
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    left = [p.name for p in folder.rglob("*") if p.suffix in (".tmp", ".old", ".ckpt")]
    assert left == []
    config = {**described.config, "out": str(tmp_path / "other")}
    assert task.run(replace(described, config=config)) == ("done", "")
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
        task.run(described)
    folder = tmp_path / "out" / described.folder
    content = json.loads((folder / "status.json").read_text())
    assert (content["state"], content["stage"]) == ("running", "plan")
    assert not (folder / "result.json").exists()


def test_a_secret_stays_in_the_environment_and_nothing_else_changes(monkeypatch):
    monkeypatch.setenv("HUB_API_KEY", "s3cret-value")
    config = {"url": "https://s3cret-value@hub", "prompt": "${seed} costs $5", "n": 1e-5}
    written = without_secrets(escaped(config), references=True)
    assert "s3cret-value" not in yaml.safe_dump(written)
    read = yaml.safe_load(yaml.safe_dump(written))
    assert OmegaConf.to_container(OmegaConf.create(read), resolve=True) == config
    assert without_secrets("rerail x=s3cret-value") == "rerail x=(hidden)"


def test_a_secret_that_was_typed_is_refused():
    with pytest.raises(InputError, match=r"model\.api_key is a secret") as refused:
        without_secrets({"model": {"api_key": "typed-by-hand"}}, references=True)
    assert "typed-by-hand" not in str(refused.value)


def test_the_choices_of_rows_and_exports_hide_secrets(composed, monkeypatch):
    monkeypatch.setenv("HUB_API_KEY", "s3cret-value")
    cell = task.describe(composed("prompt=s3cret-value"))
    assert cell.config["prompt"] == "${oc.env:HUB_API_KEY}"
    from rerail.run.compose import to_cell

    bare = composed("prompt=s3cret-value")
    bare = OmegaConf.masked_copy(bare, [name for name in bare if name != "hydra"])
    typed = to_cell(bare, "rerail prompt=s3cret-value", {})
    assert typed.prompt == "s3cret-value"
    assert typed.choices["prompt"] == "(hidden)"
    assert typed.choices["command"] == "rerail prompt=(hidden)"


@pytest.mark.parametrize("text", ["", "[1]", "a: 1", "{" * 3000, "!!python/object:os.system {}"])
def test_a_file_that_is_no_cell_is_a_sentence(tmp_path, text):
    (tmp_path / "0.yaml").write_text(text)
    with pytest.raises(InputError, match=r"0\.yaml is no cell of a sweep"):
        task.SweepCell.load(tmp_path / "0.yaml")
