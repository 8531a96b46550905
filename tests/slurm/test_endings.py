"""How jobs end on a real Slurm: at the end of their time, by hand, and with several tasks."""

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurm_bench import Bench, rows
from together import close

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ARRAY = (
    *("ratio.removed=0.25", "distill.epochs=1,119,120", "hydra.launcher.array_parallelism=3"),
    # here Slurm tells the shell of the job only, and that does not listen
    "+hydra.launcher.additional_parameters.signal=B:URG@1",
)


def stop(pid: int) -> None:
    """Let a process stand still, however fast the machine is, until Slurm wakes or ends it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)


def end_in(cluster, job: str, seconds: int) -> None:
    """Move the end of a running job's time; Slurm looks for ends twice a minute."""
    cluster.run("scontrol", "update", f"JobId={job}", f"EndTime=now+{seconds}")


def is_restarted(cluster, job: str) -> bool:
    said = cluster.run("scontrol", "show", "job", job)
    return bool(re.search(r"Restarts=[1-9]", said))


def cell_of(bench, number: int, out: str, sweep: int = 0) -> tuple[Path, str]:
    """Return the folder and the job of a cell in a sweep."""
    asked = bench.sweeps(out)[sweep]
    return bench.home / out / asked.cells[number]["folder"], asked.jobs[str(number)]


def bring_about(bench: Bench) -> dict:
    """Let a job save at the end of its time, one be cancelled and one hang; the first's status.

    `saves` is told to save. In `array` a short cell is let be, the second is cancelled by hand, and
    the third hangs until its time is over.
    """
    cluster = bench.cluster
    bench.submit(
        saves=bench.words("ratio.removed=0.25", "hydra.launcher.signal_delay_s=15"),
        array=bench.words(*ARRAY),
    )
    _, first = bench.wait_for_fit(out="saves")
    stop(first["pid"])
    cancelled, by_hand = cell_of(bench, 1, "array")
    cluster.wait_for((cancelled / "status.json").exists, 120, "the cell that is cancelled")
    cluster.cancel(by_hand)
    hanging, late = cell_of(bench, 2, "array")
    cluster.wait_for(lambda: list(hanging.glob("repair-*.ckpt")), 120, "a first round")
    hung = bench.status(hanging)["pid"]
    stop(hung)
    end_in(cluster, late, 3)
    end_in(cluster, first["job"], 45)

    def wait_for(condition: Callable[[], bool], what: str) -> None:
        def looked() -> bool:
            stop(hung)  # again, since Slurm wakes what it ends
            return condition()

        cluster.wait_for(looked, 120, f"the end of the time of the one that {what}")

    wait_for(lambda: is_restarted(cluster, first["job"]), "saves")
    cluster.run("scontrol", "update", f"JobId={first['job']}", "TimeLimit=60")
    wait_for(lambda: cluster.state(late) == "TIMEOUT", "hangs")
    return first


@pytest.fixture(scope="module")
def ended(slurm_session, tmp_path_factory, model) -> Iterator[tuple[Bench, dict]]:
    """Return what is left when jobs have ended, and how the one that saved stood before."""
    bench = Bench(slurm_session, tmp_path_factory.mktemp("ended"), model)
    try:
        yield bench, bring_about(bench)
    finally:
        slurm_session.clear()


def test_cells_out_of_time_or_cancelled_by_hand_are_lost_and_the_same_command_finishes_them(
    undisturbed, ended
):
    bench, _ = ended
    over = bench.wait_until_over("array")
    assert over.code == 1, over.said
    assert "1 done, 2 lost" in over.said
    shown = bench.sweep("status", "array", "--exit-code")
    assert shown.code == 1
    for number, state in ((1, "CANCELLED"), (2, "TIMEOUT")):
        folder, job = cell_of(bench, number, "array")
        assert bench.cluster.state(job) == state
        [line] = [line for line in shown.said.splitlines() if folder.name in line]
        assert re.search(rf"lost +its job is {state};", line)

    again = bench.rerail(*bench.words(*ARRAY), out="array")
    assert again.code == 0, again.said
    assert "2 cells submitted, 1 done already" in again.said
    folder, job = cell_of(bench, 2, "array", sweep=1)
    assert "going on with the repair" in bench.logs(job, "array")[0]
    assert rows(folder) == undisturbed
    assert len(bench.done("array")) == 3


def test_a_job_at_the_end_of_its_time_saves_when_slurm_says_so_and_goes_on(undisturbed, ended):
    bench, first = ended
    over = bench.wait_until_over("saves")
    assert over.code == 0, over.said
    [folder] = bench.folders("saves")
    last = bench.status(folder)
    assert (last["state"], last["job"]) == ("done", first["job"])
    assert last["pid"] != first["pid"]
    assert bench.cluster.wait_until(first["job"]) == "COMPLETED"
    [log] = bench.logs(first["job"], "saves")
    assert log.index("interrupted after step") < log.index("going on with the repair")
    assert rows(folder) == undisturbed


def test_two_tasks_on_one_node_or_two_also_preempted_leave_the_files_and_rows_of_one_process(bench):
    words = bench.words("ratio.removed=0.25", "distill.epochs=60")
    two = [*words, "trainer=ddp", "trainer.accelerator=cpu"]
    first_node = "+hydra.launcher.additional_parameters.nodelist=n1"
    bench.submit(
        alone=[*words, first_node],
        beside=[*two, first_node, "trainer.devices=2", "hydra.launcher.tasks_per_node=2"],
        apart=[*two, "trainer.devices=1", "trainer.num_nodes=2", "hydra.launcher.nodes=2"],
    )
    _, first = bench.wait_for_fit(out="apart")
    urgent = bench.cluster.submit(
        "sleep 1", "--partition=high", "--nodelist=n2", "--exclusive", "--time=1"
    )
    for out in ("alone", "beside", "apart"):
        _, job = cell_of(bench, 0, out)
        assert bench.cluster.wait_until(job, seconds=170) == "COMPLETED", bench.logs(job, out)
    assert bench.cluster.state(urgent) == "COMPLETED"

    [alone] = bench.done("alone")
    for out in ("beside", "apart"):
        folder, job = cell_of(bench, 0, out)
        assert bench.done(out) == [folder]
        logs = bench.logs(job, out)
        assert [log.count("Job completed successfully") for log in logs] == [1, 1]
        assert {p.name for p in folder.iterdir()} == {p.name for p in alone.iterdir()}
        ours, theirs = (
            [{n: v for n, v in row.items() if n not in ("key", "trainer")} for row in rows(one)]
            for one in (folder, alone)
        )
        assert ours[:2] == theirs[:2]
        close(ours[2], theirs[2])
    assert "going on with the repair" in logs[0]
    assert bench.status(folder)["job"] == first["job"]
    assert bench.status(folder)["pid"] != first["pid"]
