"""Sweeps on a real Slurm: as arrays, through preemption, lost nodes, cancelled jobs and edits."""

import shutil
import signal
from pathlib import Path

import pytest

import rerail
from rerail.config.presets import config_root
from slurm_bench import rows

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


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
    assert "needs a GPU" in bench.status(failed)["reason"]
    assert "1 done, 2 not applicable, 1 failed" in done.said
    assert "report.html" in done.said
    shown = bench.sweep("status", "out", "--exit-code")
    assert shown.code == 1
    assert failed.name in shown.said


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
