"""What is submitted, what is kept of it, and what is not submitted again."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rerail
from rerail.config.presets import config_root
from rerail.errors import InputError
from rerail.run.task import SweepCell
from rerail.sweep import array, job, submit
from rerail.sweep.folder import sweeps_of
from rerail.sweep.job import CellFailed, Job
from sweep_folders import cell

SETTINGS = yaml.safe_load((config_root() / "conf/hydra/launcher/slurm.yaml").read_text())
SETTINGS = {n: v for n, v in SETTINGS.items() if n not in ("_target_", "executor", "wait")}


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Put an sbatch in the path that keeps its script, and a squeue that shows `jobs`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = {
        "sbatch": f'cp "$1" {folder}/script; echo "Submitted batch job 71"',
        "srun": "exit 1",
        "squeue": f"cat {folder}/jobs 2>/dev/null",
        "sacct": "echo 'JobID|State'",
    }
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(array, "revision", lambda: "abc")
    return folder


def launched(out, cells, **changed):
    settings = {**SETTINGS, **changed}
    return array.launch(out, cells, settings, config_root() / "conf")


def test_one_array_is_submitted_and_all_of_it_is_kept(sbatch, tmp_path):
    cells = [cell(tmp_path, "a"), cell(tmp_path, "b"), cell(tmp_path, "c", "done")]
    cells.append(cell(tmp_path, "d", "failed", "no"))
    folders = launched(tmp_path, cells, gpus_per_node=1, cpus_per_task=2, array_parallelism=5)
    assert folders == ["a", "b", "c", "d"]
    [sweep] = sweeps_of(tmp_path, [])
    assert sweep.jobs == {"0": "71_0", "1": "71_1"}
    assert [c["state"] for c in sweep.cells] == ["open", "open", "done", "failed"]
    assert sorted(p.name for p in (sweep.path / "cells").iterdir()) == ["0.yaml", "1.yaml"]
    assert SweepCell.load(sweep.path / "cells" / "0.yaml") == cells[0]
    assert stat.S_IMODE((sweep.path / "jobs").stat().st_mode) == 0o700
    assert (sweep.path / "code/rerail/conf/config.yaml").exists()
    assert (sweep.path / "code/rerail/revision.txt").read_text() == "abc\n"
    script = (sbatch / "script").read_text()
    for line in ("--array=0-1%2", "--gres=gpu:1", "--requeue", "--time=240", "--signal=USR2@120"):
        assert f"#SBATCH {line}\n" in script, line
    assert f"export PYTHONPATH={sweep.path}/code" in script
    assert "--cpus-per-task=2" in script.split("srun")[1]


def test_cells_that_are_on_their_way_are_not_submitted_again(sbatch, tmp_path):
    launched(tmp_path, [cell(tmp_path, "a"), cell(tmp_path, "b")])
    (sbatch / "jobs").write_text("71_0|RUNNING|a\n71_1|PENDING|a\n")
    (sbatch / "script").unlink()
    launched(tmp_path, [cell(tmp_path, "a"), cell(tmp_path, "b")])
    assert not (sbatch / "script").exists()
    _, second = sweeps_of(tmp_path, [])
    assert second.jobs == {}
    assert not (second.path / "code").exists()
    (sbatch / "jobs").write_text("71_0|RUNNING|a\n")
    launched(tmp_path, [cell(tmp_path, "a"), cell(tmp_path, "b")])
    assert list(sweeps_of(tmp_path, []))[-1].jobs == {"1": "71"}


def test_a_refusal_of_sbatch_is_a_sentence_and_leaves_nothing(sbatch, tmp_path):
    (sbatch / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2; exit 1\n")
    with pytest.raises(InputError, match=r"sbatch refuses the sweep: .*invalid account"):
        launched(tmp_path, [cell(tmp_path, "a")])
    assert list(sweeps_of(tmp_path, [])) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"nodelst": "n1"}, "nodelist"), ({"timeout_min": "long"}, "timeout_min")],
)
def test_a_field_that_submitit_does_not_take_is_a_sentence(sbatch, tmp_path, changed, message):
    with pytest.raises(InputError, match=message):
        launched(tmp_path, [cell(tmp_path, "a")], **changed)
    assert list(sweeps_of(tmp_path, [])) == []


def test_gpus_can_be_asked_for_in_the_clusters_own_words(tmp_path):
    extra = {"gres": "gpu:a100:2", "requeue": False}
    found = submit.parameters({"gpus_per_node": 2, "additional_parameters": extra}, tmp_path)
    assert found["slurm_additional_parameters"] == extra


def test_a_job_gives_the_state_and_fails_where_the_cell_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "run", lambda one: (one.state, "because"))
    for state in ("done", "not_applicable"):
        file = cell(tmp_path, "a", state).save(tmp_path / "0.yaml")
        assert Job(file)() == state
    file = cell(tmp_path, "a", "failed").save(tmp_path / "0.yaml")
    with pytest.raises(CellFailed, match="because"):
        Job(file)()


def test_a_preempted_job_is_the_same_job_again(tmp_path):
    one = Job(tmp_path / "0.yaml")
    again = one.checkpoint()
    assert again.function is one
    assert (again.args, again.kwargs) == ((), {})
    assert one.__submitit_checkpoint__().function is one


def test_a_job_imports_the_snapshot_whatever_becomes_of_the_checkout(tmp_path):
    checkout = tmp_path / "checkout"
    skipped = shutil.ignore_patterns("__pycache__", "zoo")
    shutil.copytree(Path(rerail.__file__).parent, checkout / "rerail", ignore=skipped)
    code = "import sys, cloudpickle; from pathlib import Path; from rerail.sweep.job import Job"
    code += "; from rerail.sweep.folder import snapshot"
    code += f"; snapshot(Path({str(tmp_path)!r}), Path({str(config_root() / 'conf')!r}), None)"
    code += f"; Path({str(tmp_path / 'job.pkl')!r}).write_bytes("
    code += "cloudpickle.dumps(Job(Path('x'))))"
    python(code, checkout)
    (checkout / "rerail/run/task.py").write_text("raise SystemExit('edited')")
    read = f"import cloudpickle; job = cloudpickle.load(open({str(tmp_path / 'job.pkl')!r}, 'rb'))"
    read += "; import sys; print(sys.modules['rerail.run.task'].__file__)"
    assert python(read, tmp_path / "code") == str(tmp_path / "code/rerail/run/task.py")
    with pytest.raises(AssertionError, match="edited"):
        python(read, checkout)


def python(code: str, path: Path) -> str:
    content = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=content, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
