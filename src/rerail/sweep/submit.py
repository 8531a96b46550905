"""Submit a sweep as one Slurm job array, by submitit."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rerail.errors import InputError
from rerail.files import refusals
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

    with refusals(folder):
        folder.mkdir(mode=0o700)
    fields = dict(asked)
    limit = fields.pop("max_num_timeout")
    fields.pop("cluster", None)
    try:
        executor = submitit.AutoExecutor(folder, "slurm", slurm_max_num_timeout=limit)
        executor.update_parameters(name=folder.parent.name, **parameters(fields, code))
        with refusals(folder), executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        raise InputError(f"sbatch refuses the sweep: {(lines or [str(error)])[-1]}") from error
    except InputError:
        raise
    except (NameError, ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"hydra.launcher cannot be used by submitit: {reason}") from error
    return [str(job.job_id) for job in submitted]


def parameters(asked: Mapping[str, Any], code: Path) -> dict[str, Any]:
    """Return the arguments of submitit's AutoExecutor: GPUs by gres, requeuing, the snapshot."""
    fields = {name: value for name, value in asked.items() if value is not None}
    setup = [f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    arguments = ["--kill-on-bad-exit=1"]
    if threads := fields.get("cpus_per_task"):
        setup += [f"export OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads}"]
        arguments += [f"--cpus-per-task={threads}"]  # Slurm 22.05 and later do not hand it on
    fields["setup"] = [*setup, *fields.pop("setup", [])]
    fields["srun_args"] = [*arguments, *fields.pop("srun_args", [])]
    # a job whose node is lost is requeued, also where that is not the cluster's default
    extra: dict[str, Any] = {"requeue": True}
    if gpus := fields.pop("gpus_per_node", None):
        extra["gres"] = f"gpu:{gpus}"
    fields["additional_parameters"] = {**extra, **fields.pop("additional_parameters", {})}
    return {n if n in _GENERIC else f"slurm_{n}": value for n, value in fields.items()}
