"""From the typed results of a cell's steps to the rows of result.json."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from rerail.config.secrets import without_secrets
from rerail.distill.repair import Repair
from rerail.errors import InputError
from rerail.evaluate.estimates import mean_and_se, recovery_of
from rerail.evaluate.scores import LayerRouting, Scores
from rerail.files import digest
from rerail.language_model import LanguageModel
from rerail.moe.model import MoEModel
from rerail.moe.source import ModelSource
from rerail.plan.budget import Bits
from rerail.run.cell import Cell
from rerail.run.cost import Cost
from rerail.run.provenance import revision
from rerail.run.results import Row, new_row, write_rows


def identity(cell: Cell) -> dict[str, Any]:
    """Return the columns that all rows of a cell share."""
    groups = ("model", "compressor", "allocation", "calibration", "distill")
    return {
        **{group: cell.names.get(group) for group in groups},
        "fingerprint": fingerprint_of(cell.model),
        "key": cell.key,
        "paradigm": cell.compressor.paradigm,
        "paper": cell.compressor.paper,
        "ratio": cell.budget.removed,
        "bits": cell.budget.average if isinstance(cell.budget, Bits) else None,
        "samples": cell.calibration.samples,
        "seed": cell.seed,
        "prompt": cell.prompt,
        "choices": dict(cell.choices),
        "host": platform.node(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
    }


def fingerprint_of(model: ModelSource) -> str | None:
    """Return the hash of a model's files; None where they cannot be read."""
    try:
        return model.fingerprint()
    except (InputError, OSError):
        return None


def failed_row(cell: Cell, status: str, reason: str) -> Row:
    """Return the one row of a cell that did not finish."""
    return new_row(**identity(cell), status=status, reason=reason)


def failed_choice(config: Any, command: str, reason: str, out: Path) -> Row:
    """Write and return the row of a cell whose choices could not be understood."""
    choices = OmegaConf.to_container(config, resolve=False)
    key = digest([choices, command])
    shown = without_secrets({"command": command})
    row = new_row(status="failed", reason=reason, key=key, choices=shown)
    write_rows(out / f"failed-{key[:8]}", [row])
    return row


def stage_row(
    cell: Cell,
    stage: str,
    scores: Scores,
    cost: Cost,
    student: LanguageModel,
    teacher: LanguageModel,
    **extra: Any,
) -> Row:
    """Return the row of one stage: means over all held-out tokens, with block-clustered errors.

    Args:
        cell: its choices.
        stage: teacher, compressed or repaired.
        scores: of the stage.
        cost: of scoring.
        student: the model of the stage.
        teacher: the original model.
        extra: further columns; they win.
    """
    sizes, before = student.sizes, teacher.sizes
    columns = {
        "stage": stage,
        "granularity": "fine" if teacher.model.fine_grained else "coarse",
        **score_columns(scores),
        "evaluation_seconds": cost.seconds,
        "bytes": sizes.bytes,
        "expert_bytes": sizes.routed_bytes,
        "removed_of_experts": sizes.removed_of_experts(before),
        "removed_of_model": sizes.removed_of_model(before),
        "active_parameters": student.model.parameters_active(scores.active_experts),
        "active_experts": scores.active_experts,
        "memory_bytes": resident(student.model),
        "seconds": 0.0,
        "peak_memory": cost.peak_memory,
    }
    return new_row(**identity(cell), **{**columns, **extra})


def score_columns(scores: Scores) -> dict[str, Any]:
    """Return means over all held-out tokens with their errors, and means over the layers."""
    columns: dict[str, Any] = {"tokens": scores.tokens, "perplexity": scores.perplexity}
    for column, name in (("nll", "nll"), ("kl", "kl"), ("esap", "esap"), ("agreement", "agree")):
        columns[column], columns[f"{column}_se"] = scores.mean(name)
    layers = scores.layers()
    moved = [layer.routing_changed for layer in layers if layer.routing_changed is not None]
    return {
        **columns,
        "routing_changed": mean_or_none(moved),
        **{
            name: mean_or_none([getattr(layer, name) for layer in layers])
            for name in ("changed_choices", "changed_mass")
        },
        "load_entropy": mean_or_none([layer.load_entropy for layer in layers]),
        "layers": [layer_column(layer) for layer in layers] or None,
        "nll_by": by_text(scores),
    }


def mean_or_none(values: Sequence[float]) -> float | None:
    """Return the mean of values; None where there are none."""
    return float(np.mean(values)) if values else None


def layer_column(routing: LayerRouting) -> dict[str, Any]:
    """Return the routing of a layer as the column `layers` has it."""
    moved = {} if routing.routing_changed is None else {"routing_changed": routing.routing_changed}
    changed = {"changed_choices": routing.changed_choices, "changed_mass": routing.changed_mass}
    shares = {"load_entropy": routing.load_entropy, "load": routing.load}
    return {"layer": routing.layer, **moved, **changed, **shares}


def repair_columns(fit: Repair, cost: Cost) -> dict[str, Any]:
    """Return what a repair reached, and what it cost."""
    reached = {n: getattr(fit, n) for n in ("kl_first", "kl_best", "kl_last", "curve")}
    return {**reached, **asdict(cost)}


def resident(model: MoEModel) -> int:
    """Return the bytes of a model's tensors in memory, each storage once.

    A student whose form reads the teacher's own experts counts them in full.
    """
    tensors = [*model.model.parameters(), *model.model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def by_text(scores: Scores) -> dict[str, dict[str, Any]]:
    """Return NLL, error and count of each text on its own."""
    columns = {}
    for name, text in scores.texts.items():
        mean, se = mean_and_se(text.nll, text.tokens)
        columns[name] = {"nll": mean, "se": se, "tokens": int(sum(text.tokens))}
    return columns


def recovery_columns(teacher: Scores, compressed: Scores, repaired: Scores) -> dict[str, Any]:
    """Return recovery and its error, over all texts and, in `nll_by`, on each of them.

    Both are None where the gap is under two standard errors.
    """
    stages = (teacher, compressed, repaired)
    first, middle, last = (s.pooled("nll") for s in stages)
    overall = recovery_of(first, middle, last, teacher.pooled("tokens"))
    each = by_text(repaired)
    for name, columns in each.items():
        first, middle, last = (np.asarray(s.texts[name].nll) for s in stages)
        alone = recovery_of(first, middle, last, teacher.texts[name].tokens)
        columns |= {"recovery": alone.value, "recovery_se": alone.se}
    return {"recovery": overall.value, "recovery_se": overall.se, "nll_by": each}
