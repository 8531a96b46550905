"""The local cluster is a real Slurm: what sweeps rely on happens, and down leaves nothing."""

import os
import shutil
import subprocess
import sys

import pytest

from slurm_cluster import LOCAL, ROOT, Cluster, load_daemons

pytestmark = [pytest.mark.slurm]

# notes the signal and asks to be run again, as submitit's jobs do; the second start finishes
NOTES_AND_LEAVES = """
trap 'echo signal >> {marks}; scontrol requeue $SLURM_JOB_ID; exit' USR2
echo start >> {marks}
test $(grep -c start {marks}) = 2 && exit 0
for i in $(seq 600); do sleep 0.1; done
"""


def test_a_throttled_array_runs_all_its_elements_a_few_at_a_time(cluster: Cluster):
    job = cluster.submit("echo node $SLURMD_NODENAME; sleep 0.5", "--array=0-5%2")
    busy = []

    def is_finished() -> bool:
        states = cluster.states(job)
        busy.append(list(states.values()).count("RUNNING"))
        return len(states) == 6 and set(states.values()) == {"COMPLETED"}

    cluster.wait_for(is_finished, 40, "the array")
    assert 1 <= max(busy) <= 2
    assert all("node n" in cluster.output(f"{job}_{i}") for i in range(6))


def test_each_job_sees_the_fake_gpu_that_it_was_given(cluster: Cluster):
    script = "echo gpu=$CUDA_VISIBLE_DEVICES; sleep 3"
    jobs = [cluster.submit(script, "--gres=gpu:1", "--nodelist=n1") for _ in range(2)]
    for job in jobs:
        cluster.wait_until(job, "COMPLETED")
    assert {cluster.output(job).strip() for job in jobs} == {"gpu=0", "gpu=1"}


def test_more_gpus_than_a_node_has_are_refused(cluster: Cluster):
    done = subprocess.run(
        ["sbatch", "--gres=gpu:3", "--wrap=true"],
        env=cluster.env,
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0


def test_two_nodes_give_four_tasks_an_address_to_meet_at(cluster: Cluster):
    script = "srun bash -c 'echo task $SLURM_PROCID at $MASTER_ADDR on $SLURMD_NODENAME'"
    job = cluster.submit(script, "--nodes=2", "--ntasks-per-node=2")
    assert cluster.wait_until(job) == "COMPLETED"
    lines = sorted(cluster.output(job).splitlines())
    nodes = ("n1", "n1", "n2", "n2")
    assert lines == [f"task {i} at 127.0.0.1 on {node}" for i, node in enumerate(nodes)]


def test_sacct_tells_how_jobs_ended(cluster: Cluster):
    good = cluster.submit("true")
    bad = cluster.submit("exit 3")
    long = cluster.submit("sleep 100", "--array=0-1")
    waiting = cluster.submit("true", "--begin=now+1hour")
    cluster.wait_until(long, "RUNNING")
    cluster.cancel(f"{long}_1", waiting)
    cluster.wait_for(lambda: cluster.states(long)[f"{long}_1"] == "CANCELLED", 30, "scancel")
    assert cluster.wait_until(good) == "COMPLETED"
    assert cluster.wait_until(bad) == "FAILED"
    assert cluster.wait_until(waiting) == "CANCELLED"
    assert cluster.states(long)[f"{long}_0"] == "RUNNING"


def test_submitit_understands_the_sacct_of_the_cluster(cluster: Cluster, tmp_path):
    """The watcher of submitit itself reads pending array elements, results and cancellations."""
    code = f"""
import submitit, time
executor = submitit.AutoExecutor({str(tmp_path)!r}, cluster="slurm")
executor.update_parameters(slurm_partition="low", timeout_min=12, slurm_array_parallelism=1)
jobs = executor.map_array(time.sleep, [0, 100, 100, 100])
assert jobs[0].result() is None
jobs[0].watcher.update()
states = [job.watcher.get_state(job.job_id, mode="force") for job in jobs]
assert states[0] == "COMPLETED", states
assert states[2] == "PENDING", states
for job in jobs[1:]:
    job.cancel()
for job in jobs[1:]:
    while not job.done(force_check=True):
        time.sleep(0.3)
    assert job.state.startswith("CANCELLED"), job.state
print("understood")
"""
    assert cluster.run(sys.executable, "-c", code, timeout=60).endswith("understood")


def test_a_job_in_low_gives_way_to_high_with_a_signal_and_comes_back(cluster: Cluster, tmp_path):
    marks = tmp_path / "marks"
    low = cluster.submit(
        NOTES_AND_LEAVES.format(marks=marks),
        *("--partition=low", "--nodes=2", "--exclusive", "--signal=B:USR2@60", "--time=20"),
    )
    cluster.wait_until(low, "RUNNING")
    cluster.wait_for(marks.exists, 10, "the first start")
    high = cluster.submit("sleep 1", "--partition=high", "--nodes=2", "--exclusive")
    assert cluster.wait_until(high) == "COMPLETED"
    assert cluster.wait_until(low) == "COMPLETED"
    assert marks.read_text().split() == ["start", "signal", "start"]


def test_a_killed_node_is_noticed_and_its_job_queued_again(cluster: Cluster):
    job = cluster.submit("sleep 100", "--time=20", "--nodelist=n2")
    cluster.wait_until(job, "RUNNING", seconds=20)
    cluster.kill_node("n2")
    assert cluster.state(job) == "RUNNING", "Slurm asks its nodes now and then only"
    cluster.wait_until(job, "PENDING", seconds=80)
    assert cluster.nodes()["n2"].startswith("down")
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", job)


def test_down_leaves_no_process_and_up_twice_is_one_cluster(cluster: Cluster, tmp_path):
    own = Cluster.at(tmp_path / "own", int(cluster.env["RERAIL_SLURM_PORT"]))
    daemons = load_daemons()

    def running() -> list[list[int]]:
        return [daemons.pids(own.home, name) for name in daemons.commands(own.home)]

    try:
        exports = own.run(sys.executable, str(LOCAL / "up"))
        first = running()
        own.run(sys.executable, str(LOCAL / "up"))
        assert running() == first
        assert [len(found) for found in first] == [1, 1, 1, 1]
        assert f"export SLURM_CONF={own.home / 'slurm.conf'}" in exports
        # one that ignores what it is asked, and one that waits
        job = own.submit("trap '' TERM; sleep 200", "--array=0-1%1")
        own.wait_for(lambda: "RUNNING" in own.states(job).values(), 20, "a running job")
        assert daemons.job_processes(own.home)
    finally:
        own.run(sys.executable, str(LOCAL / "down"))
    assert running() == [[], [], [], []]
    assert not daemons.job_processes(own.home)
    assert cluster.nodes().keys() == {"n1", "n2"}, "the neighbour still answers"


def test_ids_go_on_after_down_which_needs_no_folder_to_find_its_processes(
    cluster: Cluster, tmp_path
):
    own = Cluster.at(tmp_path / "own", int(cluster.env["RERAIL_SLURM_PORT"]))
    daemons = load_daemons()
    try:
        own.up()
        waiting = own.submit(f"touch {tmp_path}/started", "--begin=now+6")
        own.run(sys.executable, str(LOCAL / "down"))
        own.up()
        assert own.state(waiting) == "CANCELLED"
        job = own.submit("sleep 200")
        assert int(job) > int(waiting)
        own.wait_until(job, "RUNNING")
    finally:
        shutil.rmtree(own.home)
        own.run(sys.executable, str(LOCAL / "down"))
    assert not any(daemons.pids(own.home, name) for name in daemons.commands(own.home))
    assert not daemons.job_processes(own.home)
    assert not (tmp_path / "started").exists()


def test_the_sanity_checks_find_the_running_cluster_and_its_limits(cluster: Cluster):
    code = """
import os
from rerail.errors import InputError
from rerail.sweep.cluster import check_cluster, local_environment
os.environ.update(local_environment())
check_cluster("low", 1440, gpus_per_node=2, nodes=2)
check_cluster(None, 11)
for asked in ({"partition": "hgih"}, {"timeout_min": 1441}, {"gpus_per_node": 3}, {"nodes": 3}):
    try:
        check_cluster(**{"partition": "low", "timeout_min": 20, **asked})
    except InputError as error:
        print(error)
"""
    bare = {k: v for k, v in cluster.env.items() if k != "SLURM_CONF"}
    plain = Cluster(cluster.home, {**bare, "PATH": os.environ["PATH"]})
    unknown, long, gpus, nodes = plain.run(sys.executable, "-c", code).splitlines()
    assert "allowed: high, low" in unknown
    assert "at most 1440" in long
    assert "have up to 2 GPUs" in gpus
    assert "has 2 such" in nodes


def test_a_missing_binary_gets_one_sentence_with_the_packages(tmp_path):
    code = "import shutil; shutil.which = lambda *a, **k: None; import daemons, pathlib;"
    code += "daemons.refuse_early(pathlib.Path('/x'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=LOCAL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "apt-get install" in done.stderr
    assert "munge" in done.stderr


def test_without_root_it_is_one_sentence(tmp_path):
    code = "import os; os.geteuid = lambda: 1000; import daemons, pathlib;"
    code += "daemons.find = lambda name: name; daemons.refuse_early(pathlib.Path('/x'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=LOCAL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "only root" in done.stderr


def test_down_without_a_cluster_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(LOCAL / "down")],
        env={**os.environ, "RERAIL_SLURM": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert str(tmp_path) in done.stderr
