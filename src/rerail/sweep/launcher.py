"""The launcher of `rerail -m`: cells in this process, or as one Slurm job array.

Hydra's submitit launcher composes a cell's config again on the node, from files that may have been
edited since, returns only when all jobs ended, and calls a cell that raised COMPLETED. So this one
resolves every cell first, and submits code and choices as they are now.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from rerail.errors import InputError
from rerail.files import check_replaceable, make_folder, refusals
from rerail.parallel import is_first
from rerail.run import task
from rerail.run.task import SweepCell
from rerail.sweep.folder import new_sweep, write_cells

EXECUTORS = ("here", "slurm")
NAME = "hydra_plugins.rerail.SweepLauncher"  # Hydra takes plugins of this package only


def register() -> None:
    """Make the launcher known to Hydra, as the default too; conf/hydra/launcher/*.yaml name it.

    An `override` in config.yaml would make it the default as well, but win against the profiles'.
    """
    Plugins.instance().class_name_to_class[NAME] = SweepLauncher
    default = {"_target_": NAME, "executor": "here"}
    ConfigStore.instance().store(group="hydra/launcher", name="basic", node=default)


class SweepLauncher(Launcher):
    """Runs or submits the cells of a sweep.

    Args:
        executor: `here` or `slurm`.
        wait: whether to stay until the last job has ended.
        slurm: fields of conf/hydra/launcher/slurm.yaml, and others of submitit's executor.
    """

    def __init__(self, executor: str = "here", wait: bool = True, **slurm: Any):
        self.executor, self.wait = executor, wait
        plain: Any = OmegaConf.to_container(OmegaConf.create(slurm), resolve=True)
        self.slurm: dict[str, Any] = plain

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra knows, and see that OUT can be written.

        `rerail.run.task` runs the cells, in a job as in this process.
        """
        self.context, self.config = hydra_context, config
        _ = config.out  # where it refers to what is not there, the sentence names it
        overview = Path(str(config.hydra.sweep.dir)) / "multirun.yaml"  # Hydra is about to write it
        try:
            check_replaceable(overview)
            make_folder(overview.parent)
            with refusals(overview):
                overview.touch()
        except InputError as error:
            task.complain(str(error))
            task.Outcome.started = True
            raise SystemExit(2) from error

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Describe every cell, then run or submit those that can be and are not done."""
        setup_globals()
        out = Path(str(self.config.out)).absolute()
        try:
            if self.executor not in EXECUTORS:
                allowed = ", ".join(EXECUTORS)
                raise InputError(
                    f"hydra.launcher.executor={self.executor!r} is not one of {allowed}"
                )
            if self.executor == "slurm":
                return self._slurm(out, job_overrides, initial_job_idx)
            return self._here(out, job_overrides, initial_job_idx)
        except InputError as error:
            task.complain(str(error))
            task.record(None, failed=True)
            return []

    def _here(
        self, out: Path, job_overrides: Sequence[Sequence[str]], first: int
    ) -> Sequence[JobReturn]:
        cells = self._described(job_overrides, first)
        if is_first():
            write_cells(new_sweep(out), [(cell, cell.state) for _, cell in cells], "here")
        task.record(out, failed=False)
        return [
            run_job(
                functools.partial(self._run, out, cell),
                config,
                "hydra.sweep.dir",
                "hydra.sweep.subdir",
                self.context,
            )
            for config, cell in cells
            if cell.state in ("open", "done")
        ]

    def _run(self, out: Path, cell: SweepCell, _: DictConfig) -> str:
        state, reason = task.run(cell)
        if reason:
            task.complain(reason)
        task.record(out, failed=state == "failed")
        return state

    def _slurm(
        self, out: Path, job_overrides: Sequence[Sequence[str]], first: int
    ) -> Sequence[JobReturn]:
        from rerail.sweep import array  # a sweep in this process needs neither table nor cluster

        array.check(self.slurm)
        cells = [cell for _, cell in self._described(job_overrides, first)]
        [conf] = [s.path for s in self.config.hydra.runtime.config_sources if s.provider == "main"]
        folders = array.launch(out, cells, self.slurm, Path(conf))
        if self.wait:
            task.record(out, failed=array.wait(out, folders) != 0)
        return []

    def _described(
        self, job_overrides: Sequence[Sequence[str]], first: int
    ) -> Sequence[tuple[DictConfig, SweepCell]]:
        """Return each cell once, with its config; say what is wrong with those that cannot run."""
        cells: dict[tuple[str, str], tuple[DictConfig, SweepCell]] = {}
        for number, overrides in enumerate(job_overrides, first):
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            with _current(config):
                cell = task.describe(config)
            if cell.reason:
                task.complain(cell.reason)
            task.record(None, failed=cell.state == "failed")
            # two lines of overrides may make the same choices: one cell, one folder
            cells.setdefault((cell.out, cell.folder), (config, cell))
        return list(cells.values())


@contextlib.contextmanager
def _current(config: DictConfig) -> Iterator[None]:
    """Let `${hydra:...}` in a cell's choices mean this cell."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
