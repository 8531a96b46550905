"""Sweeps on a real Slurm: as arrays, through preemption, lost nodes, cancelled jobs and edits."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import rerail
from families import tiny
from rerail.run.presets import config_root

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ZOO = Path(rerail.__file__).parent / "zoo/tiny_fine"
# what a second run of a cell may differ in
VOLATILE = ("host", "time", "seconds", "evaluation_seconds", "peak_memory", "revision", "choices")


class Done(NamedTuple):
    code: int
    said: str


class Bench:
    """The commands of a person who works in `home`, with the cluster in reach."""

    def __init__(self, cluster, home: Path, model: Path):
        self.cluster, self.home, self.model = cluster, home, model
        self.env = {**cluster.env, "RERAIL_CACHE": str(model / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        # as after `make slurm-up`: the profile finds the cluster by its folder
        del self.env["SLURM_CONF"]
        self.env["PATH"] = os.environ["PATH"]

    def words(self, *more: str) -> list[str]:
        text = f"[{self.model / 'text.jsonl'}]"
        return [
            *("model=local", f"model.path_or_id={self.model}", "calibration=files"),
            *(f"calibration.sources.0.paths={text}", "evaluation=file", "samples.count=32"),
            *(f"evaluation.texts.file.sources.0.paths={text}", "evaluation.texts.file.samples=4"),
            *("calibration.block=16", "evaluation.texts.file.block=16", "evaluation.new_tokens=2"),
            *("distill.batch_size=4", "distill.epochs=120", "distill.evaluations=4", "trainer=cpu"),
            *("trainer.enable_progress_bar=false", *more),
        ]

    def start(self, *words: str, out: str = "out") -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "rerail", "-m", "+slurm=local", f"out={out}", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.home, env=self.env, **pipes)

    def rerail(self, *words: str, out: str = "out") -> Done:
        child = self.start(*words, out=out)
        said, _ = child.communicate(timeout=170)
        return Done(child.returncode, said)

    def sweep(self, *words: str) -> Done:
        command = [sys.executable, "-m", "rerail.sweep", *words]
        done = subprocess.run(
            command, cwd=self.home, env=self.env, capture_output=True, text=True, check=False
        )
        return Done(done.returncode, done.stdout + done.stderr)

    def folders(self, out: str = "out") -> list[Path]:
        return sorted(p.parent for p in (self.home / out).glob("*/status.json"))

    def status(self, folder: Path) -> dict:
        return json.loads((folder / "status.json").read_text())

    def jobs(self, out: str = "out") -> list[dict[str, str]]:
        files = sorted((self.home / out / "sweeps").glob("*/jobs.json"))
        return [json.loads(file.read_text()) for file in files]

    def done(self) -> list[Path]:
        return [folder for folder in self.folders() if self.status(folder)["state"] == "done"]

    def node(self, job: str) -> str:
        return self.cluster.run("squeue", "-h", "-j", job, "-o", "%N")

    def wait_for_fit(self, before: int = 0, out: str = "out") -> tuple[Path, dict]:
        """Wait until a cell is repaired by another process than `before`; folder and status."""
        found: list[tuple[Path, dict]] = []

        def fits() -> bool:
            said = [(folder, self.status(folder)) for folder in self.folders(out)]
            found[:] = [
                (folder, held)
                for folder, held in said
                if (held["state"], held["stage"]) == ("running", "repair")
                and held["pid"] != before
                and (before or held["progress"])  # the first time some steps are made
            ]
            return bool(found)

        self.cluster.wait_for(fits, 120, "a cell in its repair")
        return found[0]

    def wait_until_over(self, out: str = "out") -> Done:
        return self.sweep("status", out, "--watch", "--exit-code")


def rows(folder: Path) -> list[dict]:
    held = json.loads((folder / "result.json").read_text())
    return [{n: v for n, v in row.items() if n not in VOLATILE} for row in held]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("qwen3_moe", vocab_size=4096).model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ZOO / name, folder / name)
    text = "It was a bright cold day, and the clocks were striking thirteen. "
    lines = [json.dumps({"text": f"{i}: {text * (3 + i % 4)}"}) for i in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def bench(cluster, tmp_path, model) -> Bench:
    return Bench(cluster, tmp_path, model)


@pytest.fixture(scope="module")
def grid(slurm_session, tmp_path_factory, model) -> tuple[Bench, Done]:
    """Return a sweep that was waited for: a good cell, one that fails, two out of reach."""
    made = Bench(slurm_session, tmp_path_factory.mktemp("grid"), model)
    words = made.words("trainer.accelerator=cpu,nonsense", "ratio.removed=0.25,0.9")
    return made, made.rerail(*words)


def test_a_grid_is_an_array_and_a_failing_cell_fails_alone(grid):
    bench, done = grid
    assert done.code == 2, done.said
    assert done.said.index("allowed ratios") < done.said.index("2 cells submitted, 2 cannot run")
    [jobs] = bench.jobs()
    states = {job: bench.cluster.states(job)[job] for job in jobs.values()}
    assert sorted(states.values()) == ["COMPLETED", "FAILED"]
    ends: dict[str, list[Path]] = {}
    for folder in bench.folders():
        ends.setdefault(bench.status(folder)["state"], []).append(folder)
    assert {state: len(folders) for state, folders in ends.items()} == {
        "done": 1,
        "failed": 1,
        "not_applicable": 2,
    }
    [failed] = ends["failed"]
    assert "nonsense" in (failed / "traceback.txt").read_text()
    assert "1 done, 2 not applicable, 1 failed" in done.said
    assert "report.html" in done.said
    shown = bench.sweep("status", "out", "--exit-code")
    assert shown.code == 1
    assert failed.name in shown.said


@pytest.fixture(scope="module")
def undisturbed(grid) -> list[dict]:
    """Return the rows of the good cell."""
    bench, done = grid
    [folder] = bench.done()
    assert rows(folder), done.said
    return rows(folder)


def test_a_job_that_is_preempted_told_to_save_and_loses_its_node_ends_the_same(bench, undisturbed):
    checkout = bench.home / "checkout"
    package = Path(rerail.__file__).parent
    shutil.copytree(package, checkout / "rerail", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conf", "slurm"):
        shutil.copytree(config_root() / name, checkout / "rerail" / name)
    bench.env["PYTHONPATH"] = str(checkout)
    chosen = ("trainer.accelerator=cpu", "ratio.removed=0.25", "hydra.launcher.wait=false")
    done = bench.rerail(*bench.words(*chosen))
    assert done.code == 0, done.said
    assert "rerail-sweep status --watch" in done.said
    for file in checkout.rglob("*.py"):
        file.write_text("raise SystemExit('edited after the sweep was submitted')")
    bench.env["PYTHONPATH"] = bench.cluster.env["PYTHONPATH"]
    assert bench.sweep("status", "out", "--exit-code").code == 3

    folder, first = bench.wait_for_fit()
    node = f"--nodelist={bench.node(first['job'])}"
    urgent = bench.cluster.submit("sleep 2", "--partition=high", node, "--exclusive")
    _, second = bench.wait_for_fit(first["pid"])
    assert bench.cluster.state(urgent) == "COMPLETED"
    assert list(folder.glob("repair-*.ckpt"))

    bench.cluster.run("scancel", "--signal=USR2", second["job"])
    _, third = bench.wait_for_fit(second["pid"])
    bench.cluster.kill_node(bench.node(third["job"]), noticed=True)

    over = bench.sweep("status", "out", "--watch", "--exit-code")
    assert over.code == 0, over.said
    last = bench.status(folder)
    [job] = bench.jobs()[0].values()
    assert {one["job"] for one in (first, second, third, last)} == {job}
    assert len({one["pid"] for one in (first, second, third, last)}) == 4
    assert bench.folders() == [folder]
    assert rows(folder) == undisturbed


def test_a_closed_terminal_stops_no_job_and_the_same_command_finishes_what_was_cancelled(bench):
    words = bench.words("distill.epochs=1,120")
    terminal = bench.start(*words)
    bench.wait_for_fit()
    terminal.send_signal(signal.SIGINT)
    said, _ = terminal.communicate(timeout=60)
    assert terminal.returncode == 130, said
    assert "rerail-sweep cancel" in said
    other = bench.cluster.submit("sleep 600")
    bench.cluster.wait_for(lambda: len(bench.done()) == 1, 60, "the short cell")
    shown = bench.sweep("status", "out", "--exit-code")
    assert shown.code == 3
    assert "repair, step" in shown.said
    assert bench.sweep("cancel", "out").said.startswith("cancelled 1 jobs")
    over = bench.sweep("status", "out", "--watch", "--exit-code")
    assert over.code == 1
    assert "1 done, 1 lost" in over.said
    assert bench.cluster.state(other) in ("RUNNING", "PENDING")
    again = bench.rerail(*words)
    assert again.code == 0, again.said
    assert "1 cells submitted, 1 done already" in again.said
    assert bench.done() == bench.folders()


def test_what_the_cluster_cannot_do_is_a_sentence_before_anything_is_submitted(bench):
    for word, said in (
        ("hydra.launcher.partition=nowhere", "nowhere"),
        ("hydra.launcher.timeout_min=1", "timeout_min"),
        ("slurm=nowhere", "a100x8x2"),
    ):
        done = bench.rerail(*bench.words(), word)
        assert done.code == 2, done.said
        assert said in done.said
        assert "Traceback" not in done.said
    assert [p.name for p in bench.home.iterdir()] == ["out"]
    assert [p.name for p in (bench.home / "out").iterdir()] == ["multirun.yaml"]
