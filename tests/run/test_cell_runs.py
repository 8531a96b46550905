"""A whole cell on a tiny model and a tiny text: re-entrance, rows, refusals."""

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from checkpoints import checkpoint
from families import tiny
from rerail import api
from rerail.config.presets import config_root
from rerail.errors import InputError, OutOfReach
from rerail.moe.source import ModelSource
from rerail.plan.plan import Plan
from rerail.run import pipeline as runner
from rerail.run import stages
from rerail.run import status as status_file
from rerail.run.compose import to_cell
from rerail.text.calibration import Calibration

SAME = ("host", "time", "seconds", "evaluation_seconds", "peak_memory", "revision")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


def small_cell(model_folder: Path, *overrides: str):
    GlobalHydra.instance().clear()
    text = f"[{model_folder / 'text.jsonl'}]"
    words = [
        *("model=local", f"model.path_or_id={model_folder}", "calibration=files"),
        *(f"calibration.sources.0.paths={text}", "evaluation=file", "samples.count=16"),
        *(f"evaluation.texts.file.sources.0.paths={text}", "evaluation.texts.file.samples=6"),
        *("calibration.block=16", "evaluation.texts.file.block=16", "evaluation.new_tokens=4"),
        *("++distill.batch_size=4", "++distill.epochs=1", "++distill.evaluations=2"),
        *("trainer=cpu", "trainer.enable_progress_bar=false"),
    ]
    with initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
        return to_cell(compose("config", [*words, *overrides]), "rerail test")


@pytest.fixture
def cell(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RERAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return partial(small_cell, model_folder)


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """Return the folder of a run, with `cache` and `out`, and its rows."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RERAIL_CACHE", str(folder / "cache"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return folder, runner.run_cell(small_cell(model_folder), folder / "out")


def comparable(rows):
    return [{k: v for k, v in row.items() if k not in SAME} for row in rows]


def test_a_cell_gives_one_row_a_stage_with_the_same_tokens(finished, model_folder):
    _, rows = finished
    assert [r["stage"] for r in rows] == ["teacher", "compressed", "repaired"]
    assert len({r["tokens"] for r in rows}) == 1
    assert (rows[0]["kl"], rows[0]["esap"], rows[0]["agreement"]) == (0.0, 1.0, 1.0)
    assert rows[1]["kl"] > 0
    assert 0 < rows[1]["esap"] < 1
    assert [r["changed_choices"] for r in rows] == [0.0, 0.0, 0.0]  # kept experts are their own
    assert rows[1]["bytes"] < rows[0]["bytes"]
    assert rows[1]["removed_of_experts"] == pytest.approx(0.5)
    assert rows[2]["kl_best"] <= rows[2]["kl_first"]
    assert rows[1]["seconds"] > 0
    assert {r["fingerprint"] for r in rows} == {ModelSource(str(model_folder)).fingerprint()}


def test_the_rows_follow_the_choices_by_which_a_folder_is_named(cell):
    assert cell().folder == cell().folder
    assert cell().folder != cell("seed=1").folder
    assert cell().key != cell("calibration.block=15").key


class Killed(BaseException):
    """Stands for SIGKILL: nothing below may catch it."""


STEPS = ["text", "load", "plan", "apply", "evaluate teacher", "evaluate compressed", "repair"]
STEPS += ["evaluate repaired", "done"]


@pytest.mark.parametrize("step", STEPS)
def test_a_run_killed_at_any_step_ends_with_the_same_numbers(
    cell, finished, tmp_path, monkeypatch, step
):
    undisturbed = comparable(finished[1])
    write = status_file.Status.write

    def die(self, state, stage="", reason=""):
        write(self, state, stage, reason)
        if step in (stage, state):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(status_file.Status, "write", die)
        with pytest.raises(Killed):
            runner.run_cell(cell(), tmp_path / "out")
    assert comparable(runner.run_cell(cell(), tmp_path / "out")) == undisturbed


def test_finished_stages_are_not_run_again(cell, finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    [folder] = (tmp_path / "out").iterdir()
    (folder / "result.json").unlink()
    (folder / "repaired.json").unlink()

    def refuse(*_, **__):
        raise AssertionError("this stage was finished")

    for name in ("collect_statistics", "make_plan"):
        monkeypatch.setattr(api, name, refuse)
    monkeypatch.setattr(api.fitting, "repair", refuse)
    rows = runner.run_cell(cell(), tmp_path / "out")
    assert [row["seconds"] for row in rows] == [row["seconds"] for row in finished[1]]
    assert Plan.load(folder / "plan.json").layers


@pytest.mark.parametrize(
    "name", ["plan.json", "repair.json", "repair.safetensors", "compressed.json"]
)
def test_a_damaged_artefact_is_noticed_and_made_again(cell, finished, tmp_path, caplog, name):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    before = comparable(finished[1])
    [folder] = (tmp_path / "out").iterdir()
    (folder / "result.json").unlink()
    damaged = bytearray((folder / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / name).write_bytes(bytes(damaged))
    assert comparable(runner.run_cell(cell(), tmp_path / "out")) == before
    assert "damaged" in caplog.text


def test_the_calibration_text_has_a_batch_size_of_its_own(cell, tmp_path, monkeypatch):
    sizes, collect = [], api.collect_statistics

    def counted(model, batches, *rest):
        sizes.append([len(ids) for ids, _ in batches])
        return collect(model, batches, *rest)

    monkeypatch.setattr(api, "collect_statistics", counted)
    words = ("evaluation.batch_size=3", "++calibration.batch_size=5", "distill=none")
    runner.run_cell(cell(*words), tmp_path / "out")
    assert sizes == [[5, 5, 5, 1]]


def test_other_weights_in_the_same_folder_are_another_input(cell, tmp_path, model_folder):
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    first = runner.run_cell(cell(f"model.path_or_id={copy}"), tmp_path / "out")
    tiny("qwen3_moe", seed=5, vocab_size=4096).model.save_pretrained(copy)
    second = runner.run_cell(cell(f"model.path_or_id={copy}"), tmp_path / "out")
    assert first[0]["nll"] != second[0]["nll"]


def test_the_teacher_is_asked_once_for_all_cells_of_a_model(cell, tmp_path, monkeypatch):
    asked, ask = [], stages.continuation

    def counted(model, *words):
        asked.append(model)
        return ask(model, *words)

    monkeypatch.setattr(stages, "continuation", counted)
    first = runner.run_cell(cell("distill=none"), tmp_path / "out")
    assert len(asked) == 2
    second = runner.run_cell(cell("distill=none", "ratio=quarter"), tmp_path / "out")
    assert len(asked) == 3
    assert first[0]["samples_text"] == second[0]["samples_text"] != ""
    runner.run_cell(cell("distill=none", "prompt=Another"), tmp_path / "out")
    assert len(asked) == 5


@dataclass(frozen=True)
class Tasks:
    """Stands for lm-eval, and notes whenever it is asked."""

    name: str
    asked: list[str]

    def check(self) -> None:
        pass

    def fingerprint(self) -> dict[str, str]:
        return {"name": self.name}

    def evaluate(self, *_: object) -> list[dict]:
        self.asked.append(self.name)
        return [{"task": self.name, "metric": "acc", "value": 0.5, "se": None, "n": 1}]


def test_a_second_cell_does_not_tokenise_the_text_again(
    cell, finished, tmp_path, monkeypatch, model_folder
):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    made = []
    blocks = Calibration.blocks
    monkeypatch.setattr(
        Calibration, "blocks", lambda self, *args: (made.append(self), blocks(self, *args))[1]
    )
    runner.run_cell(cell("compressor=ean", "distill=none"), tmp_path / "out")
    assert made == []
    again = tmp_path / "model"
    shutil.copytree(model_folder, again)
    file = again / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "NFKC"}}))
    runner.run_cell(cell("distill=none", f"model.path_or_id={again}"), tmp_path / "out")
    assert len(made) == 2  # held-out text and calibration


def test_the_teachers_tasks_are_scored_once_for_the_same_settings(cell, tmp_path):
    asked: list[str] = []
    for number, (ratio, name) in enumerate([("half", "x"), ("quarter", "x"), ("half", "y")]):
        made = cell("distill=none", f"ratio={ratio}")
        evaluation = replace(made.evaluation, tasks=Tasks(name, asked))
        rows = runner.run_cell(replace(made, evaluation=evaluation), tmp_path / str(number))
        assert [row["tasks"][0]["task"] for row in rows] == [name, name]
    assert asked == ["x", "x", "x", "y", "y"]


def test_a_teacher_in_another_dtype_is_another_teacher(cell, tmp_path):
    rows = [
        runner.run_cell(cell("distill=none", f"+model.dtype={dtype}"), tmp_path / "out")
        for dtype in ("float32", "bfloat16")
    ]
    assert rows[0][0]["nll"] != rows[1][0]["nll"]


def test_ratio_zero_changes_nothing(cell, tmp_path):
    rows = runner.run_cell(cell("ratio=none", "distill=none"), tmp_path / "out")
    assert [r["stage"] for r in rows] == ["teacher", "compressed"]
    assert rows[1]["nll"] == rows[0]["nll"]
    assert rows[1]["kl"] == 0.0


def test_a_ratio_out_of_reach_is_refused_before_anything_is_written(cell, tmp_path):
    with pytest.raises(OutOfReach, match="top_k = 2"):
        runner.run_cell(cell("ratio.removed=0.9"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_in_a_sweep_it_is_a_row_that_says_why(cell, tmp_path):
    [row] = runner.run_or_record(cell("ratio.removed=0.9"), tmp_path / "out")
    assert row["status"] == "not_applicable"
    assert "allowed" in row["reason"]


def test_in_a_sweep_a_crash_is_a_failed_row_with_its_traceback(cell, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "make_plan", lambda *_, **__: 1 / 0)
    [row] = runner.run_or_record(cell(), tmp_path / "out")
    assert row["status"] == "failed"
    assert "ZeroDivisionError" in row["reason"]
    [folder] = (tmp_path / "out").iterdir()
    assert "make_plan" in (folder / "traceback.txt").read_text()
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


def test_weights_that_are_not_finite_are_refused(cell, tmp_path, model_folder):
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    model = tiny("qwen3_moe", vocab_size=4096).model
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = torch.nan
    model.save_pretrained(copy)
    with pytest.raises(InputError, match="NaN"):
        runner.run_cell(cell(f"model.path_or_id={copy}"), tmp_path / "out")


def test_an_exported_model_lies_beside_the_rows_and_was_reloaded(cell, tmp_path):
    runner.run_cell(cell("export=native"), tmp_path / "out")
    [folder] = (tmp_path / "out").iterdir()
    assert (folder / "model" / "model.safetensors").exists()
    assert (folder / "model" / "compression.json").exists()
    assert (folder / "reload.json").exists()


def test_what_cannot_be_exported_is_refused_before_the_repair(cell, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "repair", lambda *_: 1 / 0)
    with pytest.raises(InputError, match="densify"):
        runner.run_cell(cell("export=native", "compressor=hc_smoe"), tmp_path / "out")


WITHOUT_STEPS = ["++distill.batch_size=16", "~distill.epochs", "~distill.evaluations"]


def test_a_router_solved_in_closed_form_leaves_the_same_rows_and_is_used_again(
    cell, tmp_path, monkeypatch
):
    solved = cell("distill=ridge", *WITHOUT_STEPS, "distill.ridge=0.1")
    rows = runner.run_cell(solved, tmp_path / "out")
    assert [row["stage"] for row in rows] == ["teacher", "compressed", "repaired"]
    assert [point["step"] for point in rows[2]["curve"]] == [0, 1]
    assert rows[2]["kl_best"] == min(rows[2]["kl_first"], rows[2]["kl_last"])
    assert (rows[2]["nll"] != rows[1]["nll"]) == (rows[2]["kl_last"] < rows[2]["kl_first"])
    [folder] = (tmp_path / "out").iterdir()
    (folder / "result.json").unlink()
    monkeypatch.setattr(api.fitting, "repair", None)  # repair.json is read back
    assert comparable(runner.run_cell(solved, tmp_path / "out")) == comparable(rows)


def test_a_bias_that_no_router_adds_is_a_row_that_is_not_applicable(cell, tmp_path):
    [row] = runner.run_or_record(cell("distill=ridge_bias", *WITHOUT_STEPS), tmp_path / "out")
    assert row["status"] == "not_applicable"
    assert "adds none to its logits" in row["reason"]


def test_a_search_that_was_killed_goes_on_from_the_students_that_it_judged(
    cell, tmp_path, monkeypatch
):
    search = ["allocation=search", "allocation.evaluations=4", "allocation.blocks=4"]
    searched = cell(*search, "++compressor.router=mask", "distill=none")
    judge, judged = api.plan_fitness, []

    def counting(stop_after):
        def make(*arguments):
            fitness = judge(*arguments)

            def judge_and_count(plan):
                if len(judged) == stop_after:
                    raise Killed
                judged.append(plan)
                return fitness(plan)

            return judge_and_count

        return make

    monkeypatch.setattr(api, "plan_fitness", counting(2))
    with pytest.raises(Killed):
        runner.run_cell(searched, tmp_path / "out")
    monkeypatch.setattr(api, "plan_fitness", counting(100))
    rows = runner.run_cell(searched, tmp_path / "out")
    assert len(judged) == 4
    [folder] = (tmp_path / "out").iterdir()
    lineage = Plan.load(folder / "plan.json").lineage
    assert lineage["search"]["evaluations"] == 4
    assert lineage["search"]["best"] >= lineage["search"]["even"]
    assert sum(lineage["counts"]) == 8
    monkeypatch.setattr(api, "plan_fitness", judge)
    assert comparable(runner.run_cell(searched, tmp_path / "undisturbed")) == comparable(rows)
