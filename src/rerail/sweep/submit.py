"""Submit a sweep as one Slurm job array, by submitit."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rerail.errors import InputError
from rerail.sweep.job import Job

_GENERIC = ("timeout_min", "nodes", "tasks_per_node", "cpus_per_task", "mem_gb")


def submit(jobs: Sequence[Job], folder: Path, code: Path, asked: Mapping[str, Any]) -> list[str]:
    """Submit the jobs and return their Slurm ids.

    Args:
        jobs: one a cell.
        folder: of submitit's files; only its owner may enter it, since they are pickles.
        code: the snapshot that the jobs import.
        asked: the fields of conf/hydra/launcher/slurm.yaml, and any other of submitit's executor.

    Raises:
        InputError: a field is unknown or does not fit, or sbatch refuses.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder.mkdir(mode=0o700)
    given = dict(asked)
    limit = given.pop("max_num_timeout")
    given.pop("cluster", None)
    try:
        executor = submitit.AutoExecutor(folder, "slurm", slurm_max_num_timeout=limit)
        executor.update_parameters(name=folder.parent.name, **parameters(given, code))
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        raise InputError(f"sbatch refuses the sweep: {(lines or [str(error)])[-1]}") from error
    except (NameError, ValueError, AssertionError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"hydra.launcher cannot be used by submitit: {said}") from error
    return [str(job.job_id) for job in submitted]


def parameters(asked: Mapping[str, Any], code: Path) -> dict[str, Any]:
    """Return the arguments of submitit's AutoExecutor: GPUs by gres, requeuing, the snapshot."""
    given = {name: value for name, value in asked.items() if value is not None}
    setup = [f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    arguments = ["--kill-on-bad-exit=1"]
    if threads := given.get("cpus_per_task"):
        setup += [f"export OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads}"]
        arguments += [f"--cpus-per-task={threads}"]  # Slurm 22.05 and later do not hand it on
    given["setup"] = [*setup, *given.pop("setup", [])]
    given["srun_args"] = [*arguments, *given.pop("srun_args", [])]
    extra: dict[str, Any] = {
        "requeue": True
    }  # also where the cluster's default is not to, after a lost node
    if gpus := given.pop("gpus_per_node", None):
        extra["gres"] = f"gpu:{gpus}"
    given["additional_parameters"] = {**extra, **given.pop("additional_parameters", {})}
    return {n if n in _GENERIC else f"slurm_{n}": value for n, value in given.items()}
