"""The command line as a person meets it: exit codes and sentences."""

import csv
import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
from hydra.core.global_hydra import GlobalHydra

from rerail import __main__ as surface
from rerail.run import task


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def rerail(tmp_path, monkeypatch, capfd):
    """Run the entry point in this process, as from a shell in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RERAIL_DATA", raising=False)
    monkeypatch.setenv("RERAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*words: str) -> Done:
        GlobalHydra.instance().clear()
        for name, value in (("started", False), ("failed", False), ("out", None)):
            monkeypatch.setattr(task.Outcome, name, value)
        monkeypatch.setattr(sys, "argv", ["rerail", *words])
        with pytest.raises(SystemExit) as exit_:
            surface.main()
        return Done(int(exit_.value.code or 0), *capfd.readouterr())

    return run


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("compresor=reap", "did you mean compressor?"),
        ("compressor=reapp", "hc_smoe"),
        ("calibration.blocks=3", "did you mean block?"),
        ("samples.cout=3", "did you mean samples.count?"),
        ("ratio.removed=1.5", "outside [0, 1)"),
        ("ratio.removed=0.9", "allowed ratios: 0 to 0.75"),
        ("seed=abc", "seed='abc' is not int"),
        ("distill.average=mean", "one of sequence, token"),
        ("distill.temperature=0", "must be greater than 0"),
        ("trainer.acelerator=cpu", "did you mean accelerator?"),
        ("model=deepseek_moe_16b_base", "not in transformers 5.23"),
        ("model=olmoe_1b_7b", "hub id"),
        ("evaluation=tasks", "RERAIL_DATA is not set"),
        ("evaluation=wikitext2", "RERAIL_DATA is not set"),
        ("allocation=per_layer", "must be given"),
        ("compressor.bases=3", "bases does not exist"),
    ],
)
def test_bad_words_get_a_sentence_and_exit_status_2(rerail, tmp_path, word, message):
    done = rerail(word, "out=here")
    assert done.code == 2, done.err
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.glob("here/*"))


def test_help_comes_without_torch_and_a_real_process_exits_with_2(tmp_path):
    for name in ("torch", "transformers", "lightning"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    for words, code, message in (
        (["--help"], 0, "compressor"),
        (["compresor=reap"], 2, "did you mean"),
    ):
        command = [sys.executable, "-m", "rerail", *words]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        assert done.returncode == code, done.stderr
        assert message in done.stdout + done.stderr


def test_a_grid_runs_on_after_a_bad_cell_and_exits_with_2(rerail, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("A quick brown fox jumps over the lazy dog. " * 400)
    words = ["-m", "ratio.removed=0.25,1.5,0.9", "out=here", "distill=none", "samples.count=8"]
    words += [f"calibration.sources.0.paths=[{text}]", "calibration=files", "evaluation=file"]
    words += [f"evaluation.texts.file.sources.0.paths=[{text}]", "evaluation.new_tokens=4"]
    words += ["evaluation.texts.file.samples=4", "evaluation.texts.file.block=32"]
    done = rerail(*words, "calibration.block=32")
    assert done.code == 2, done.err
    assert "outside [0, 1)" in done.err
    with (tmp_path / "here/results.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert sorted(r["status"] for r in rows) == ["done", "done", "failed", "not_applicable"]
    assert [r["stage"] for r in rows if r["status"] == "done"] == ["teacher", "compressed"]
    assert done.out.strip().splitlines()[-1] == f"report: {tmp_path / 'here/report.html'}"
    wanted = {"model", "compressor", "ratio", "seed", "stage", "nll", "nll_se", "tokens", "kl"}
    assert wanted | {"bytes", "recovery", "seconds"} <= set(rows[0])
    results = [json.loads(p.read_text()) for p in (tmp_path / "here").glob("*/result.json")]
    commands = [row["choices"]["command"] for rows in results for row in rows]
    assert all("ratio.removed=" in c and "out=" not in c for c in commands)


def test_the_same_cell_twice_in_a_grid_runs_once_and_an_unknown_profile_lists_those_there_are(
    rerail, tmp_path
):
    done = rerail("-m", "ratio.removed=1.5,1.5", "seed=0", "out=here")
    assert done.code == 2
    cells = [json.loads(p.read_text()) for p in (tmp_path / "here/sweeps").glob("*/cells.json")]
    assert [len(one["cells"]) for one in cells] == [1]
    unknown = rerail("-m", "+slurm=nowhere", "out=here")
    assert unknown.code == 2
    assert all(name in unknown.err for name in ("a100", "a100x8", "a100x8x2", "local"))
    wrong = rerail("-m", "seed=0", "hydra.launcher.executor=moon", "out=here")
    assert (wrong.code, wrong.err) == (
        2,
        "rerail: hydra.launcher.executor='moon' is not one of here, slurm\n",
    )


def test_the_package_folder_is_found_from_anywhere(rerail):
    assert "conf" in rerail("--info", "searchpath").out
