"""Every launcher profile asks for what its trainer uses, in words that Slurm and submitit know."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf
from submitit import AutoExecutor, SlurmExecutor

from rerail.config.presets import config_root
from rerail.distill.trainer import check_processes
from rerail.sweep import launcher, submit
from rerail.sweep.cluster import check_walltime

OURS = ("max_num_timeout", "cluster")  # of the launcher, not of sbatch
PROFILES = sorted((config_root() / "slurm").glob("*.yaml"))


@pytest.fixture(params=PROFILES, ids=lambda path: path.stem)
def profile(request):
    GlobalHydra.instance().clear()
    search = f"hydra.searchpath=[file://{config_root()}]"
    with initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
        words = [search, f"+slurm={request.param.stem}"]
        return request.param, compose("config", words, return_hydra_config=True)


def test_it_is_one_of_our_launchers_and_says_what_it_is_for(profile):
    path, config = profile
    launcher.register()
    made = Plugins.instance()._instantiate(config.hydra.launcher)
    assert isinstance(made, launcher.SweepLauncher)
    assert (made.executor, made.wait) == ("slurm", True)
    header = path.read_text().splitlines()[1:3]
    assert [line.split()[1] for line in header] == ["For:", "Command:"]
    assert f"+slurm={path.stem}" in header[1]


def test_a_preempted_job_resumes_often_enough_and_has_the_time_to_save(profile):
    asked = profile[1].hydra.launcher
    assert asked.max_num_timeout >= 10
    check_walltime(asked.timeout_min, asked.signal_delay_s)


def test_as_many_processes_are_started_as_the_trainer_uses(profile, monkeypatch):
    _, config = profile
    asked = config.hydra.launcher
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(asked.nodes * asked.tasks_per_node))
    check_processes(OmegaConf.to_container(config.trainer, resolve=True))
    assert asked.gpus_per_node in (None, asked.tasks_per_node)


def test_submitit_takes_its_fields(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    plain = OmegaConf.to_container(profile[1].hydra.launcher, resolve=True)
    kept = {n: v for n, v in plain.items() if n not in ("_target_", "executor", "wait", *OURS)}
    made = submit.parameters(kept, Path("code"))
    AutoExecutor(tmp_path, "slurm").update_parameters(**made)
    gpus = plain["gpus_per_node"]
    assert made["slurm_additional_parameters"].get("gres") == (gpus and f"gpu:{gpus}")
