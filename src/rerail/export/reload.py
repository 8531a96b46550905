"""Prove that a checkpoint loads in a fresh process with stock `from_pretrained`.

Where rerail is not, too: only the package form needs it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rerail.export.checkpoint import MANIFEST
from rerail.files import temporary_folder
from rerail.moe.families import implementations
from rerail.moe.left_out import not_carried
from rerail.moe.model import MoEModel

_SCRIPT = Path(__file__).with_name("reload_script.py")


class ReloadError(RuntimeError):
    """A checkpoint does not load with stock transformers, or computes something else."""


@torch.no_grad()
def logits_of(model: MoEModel, ids: Tensor) -> Tensor:
    """Return the logits (B, S, V) of token ids (B, S), on the CPU."""
    device = next(model.model.parameters()).device
    out: Tensor = model.model(input_ids=ids.to(device), use_cache=False).logits
    return out.cpu()


def tolerance(dtype: torch.dtype) -> float:
    """Return the allowed logit difference as a share of the largest logit.

    Equal bits are the rule; a matrix product may still order its sums by where memory happens to
    lie.
    """
    return 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2


def check_reload(path: Path, ids: Tensor, model: MoEModel, form: str = "native") -> float:
    """Return the largest absolute difference of logits between a reloaded checkpoint and `model`.

    The fresh process loads in the dtype, on the device, with the number of threads and with the
    implementations of experts and attention of `model`, so that only weights can make a difference.

    Args:
        path: the checkpoint's folder.
        ids: token ids (B, S) to compare on.
        model: what the checkpoint must be (`as_written`).
        form: `native`, `package` or `remote`: what the fresh process needs.

    Raises:
        ReloadError: it does not load, tensors are missing or left over, or the logits differ.
    """
    with temporary_folder() as exchange:
        write_task(exchange, ids, model, form)
        # transformers copies remote code into a cache before it runs it
        own = {"HF_MODULES_CACHE": str(exchange / "modules")}
        command = [sys.executable, "-P", str(_SCRIPT), str(path.absolute()), str(exchange)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **own}
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ReloadError(f"{path} does not load with stock transformers: {last}")
        return verdict(path, exchange, model)


def verdict(path: Path, exchange: Path, model: MoEModel) -> float:
    """Return the difference that a fresh process reported in the exchange folder.

    Raises:
        ReloadError: as `check_reload`.
    """
    report = json.loads((exchange / "report.json").read_text(encoding="utf-8"))
    _forgive_carried(report["misfits"], path, model)
    return judge(path, report, model.model.dtype)


def _forgive_carried(misfits: dict[str, list[str]], path: Path, model: MoEModel) -> None:
    """Drop from a report what the parent's class had no place for either, in place."""
    left = not_carried(model.model, misfits.pop("unexpected_keys", ()), path / MANIFEST)
    if left:
        misfits["unexpected_keys"] = left


def write_task(exchange: Path, ids: Tensor, model: MoEModel, form: str = "native") -> None:
    """Write for the fresh process what it compares with and how it loads."""
    options: dict[str, Any] = {n: o for n, o in implementations(model.config).items() if o}
    if form == "remote":
        options["trust_remote_code"] = True
    task = {
        "imports": ["rerail.auto"] if form == "package" else [],
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": str(next(model.model.parameters()).device),
        "threads": torch.get_num_threads(),
        "options": options,
    }
    (exchange / "task.json").write_text(json.dumps(task), encoding="utf-8")
    tensors = {"ids": ids.cpu().contiguous(), "logits": logits_of(model, ids).contiguous()}
    save_file(tensors, exchange / "expected.safetensors")


def judge(path: Path, report: Mapping[str, Any], dtype: torch.dtype) -> float:
    """Return the difference that the fresh process reported, or raise ReloadError."""
    difference, largest = float(report["difference"]), float(report["largest"])
    if report["misfits"]:
        raise ReloadError(f"{path} loads with tensors that do not fit: {report['misfits']}")
    if report.get("rerail_was_loaded"):
        raise ReloadError(f"{path} was loaded in a process that had imported rerail")
    if not difference <= tolerance(dtype) * largest:
        raise ReloadError(
            f"{path} reloads with logits that differ by {difference:g}; the largest is {largest:g}"
        )
    return difference
