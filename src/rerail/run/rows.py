"""From the numbers of a cell's stages to the rows of result.json."""

import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from rerail.evaluate.estimates import mean_and_se, recovery_of
from rerail.files import digest
from rerail.moe.model import MoEModel
from rerail.plan.budget import Bits
from rerail.plan.sizes import Sizes
from rerail.run.cell import Cell
from rerail.run.results import Row, new_row, write_rows
from rerail.versions import package_version

Scores = Mapping[str, Any]


def revision() -> str | None:
    """Return the git revision of this code, `+` where it was edited; None outside git."""
    here = Path(__file__).parent
    snapshot = here.parent / "revision.txt"  # of a sweep: outside git, or in another place of it
    if snapshot.exists():
        return snapshot.read_text(encoding="utf-8").strip() or None
    try:
        head = subprocess.run(
            ["git", "-C", here, "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", here, "status", "--porcelain", "--", "."],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def provenance() -> dict[str, Any]:
    """Return the git revision and the versions of the libraries that numbers depend on."""
    names = ("rerail", "torch", "transformers", "lightning", "numpy", "scipy", "tokenizers")
    versions = {name: package_version(name) for name in names}
    return {"revision": revision(), "python": platform.python_version(), "versions": versions}


def identity(cell: Cell) -> dict[str, Any]:
    """Return the columns that all rows of a cell share."""
    named = {
        n: cell.names.get(n)
        for n in ("model", "compressor", "allocation", "calibration", "distill")
    }
    return {
        **named,
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


def failed_row(cell: Cell, status: str, reason: str) -> Row:
    """Return the one row of a cell that did not finish."""
    return new_row(**identity(cell), status=status, reason=reason)


def failed_choice(config: Any, command: str, reason: str, out: Path) -> Row:
    """Write and return the row of a cell whose choices could not be understood."""
    choices = OmegaConf.to_container(config, resolve=False)
    key = digest([choices, command])
    row = new_row(status="failed", reason=reason, key=key, choices={"command": command})
    write_rows(out / f"failed-{key[:8]}", [row])
    return row


def pooled(scores: Scores, name: str) -> np.ndarray:
    """Return the per-block sums of all texts, in the order of their names."""
    texts = [scores[text] for text in sorted(scores) if isinstance(scores[text], dict)]
    return np.concatenate([np.asarray(text[name]) for text in texts])


def stage_row(
    cell: Cell, stage: str, scores: Scores, model: MoEModel, teacher: MoEModel, **extra: Any
) -> Row:
    """Return the row of one stage: means over all held-out tokens, with block-clustered errors."""
    tokens = pooled(scores, "tokens")
    nll, nll_se = mean_and_se(pooled(scores, "nll"), tokens)
    kl, kl_se = mean_and_se(pooled(scores, "kl"), tokens)
    agreement, agreement_se = mean_and_se(pooled(scores, "agree"), tokens)
    sizes, before = (Sizes.of(m, cell.model.itemsize()) for m in (model, teacher))
    layers = layer_means(scores)
    moved = [entry["routing_changed"] for entry in layers if "routing_changed" in entry]
    return new_row(
        **identity(cell),
        stage=stage,
        granularity="fine" if teacher.fine_grained else "coarse",
        nll=nll,
        nll_se=nll_se,
        perplexity=math.exp(nll),
        kl=kl,
        kl_se=kl_se,
        agreement=agreement,
        agreement_se=agreement_se,
        tokens=int(tokens.sum()),
        routing_changed=float(np.mean(moved)) if moved else None,
        load_entropy=float(np.mean([e["load_entropy"] for e in layers])) if layers else None,
        layers=layers or None,
        evaluation_seconds=scores["seconds"],
        bytes=sizes.bytes,
        expert_bytes=sizes.routed_bytes,
        removed_of_experts=sizes.removed_of_experts(before),
        removed_of_model=sizes.removed_of_model(before),
        active_parameters=model.parameters_active(active_experts(scores)),
        active_experts=active_experts(scores),
        memory_bytes=resident(model),
        **{
            "seconds": 0.0,
            "peak_memory": scores["peak_memory"],
            "nll_by": by_text(scores),
            **extra,
        },
    )


def resident(model: MoEModel) -> int:
    """Return the bytes of a model's tensors in memory, each storage once.

    A student whose form reads the teacher's own experts counts them in full.
    """
    tensors = [*model.model.parameters(), *model.model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def active_experts(scores: Scores) -> float:
    """Return the experts computed for a token and layer, on average over all held-out tokens."""
    texts = [s for s in scores.values() if isinstance(s, dict)]
    return float(
        np.average([s["active"] for s in texts], weights=[sum(s["tokens"]) for s in texts])
    )


def by_text(scores: Scores) -> dict[str, dict[str, Any]]:
    """Return NLL, error and count of each text on its own."""
    found = {}
    for name, held in scores.items():
        if isinstance(held, dict):
            mean, se = mean_and_se(held["nll"], held["tokens"])
            found[name] = {"nll": mean, "se": se, "tokens": int(sum(held["tokens"]))}
    return found


def layer_means(scores: Scores) -> list[dict[str, Any]]:
    """Return per-layer routing numbers, weighted over the texts by their tokens."""
    texts = [s for s in scores.values() if isinstance(s, dict)]
    weights = [sum(s["tokens"]) for s in texts]
    return [
        {
            "layer": parts[0]["layer"],
            **{
                name: float(np.average([part[name] for part in parts], weights=weights))
                for name in ("routing_changed", "load_entropy")
                if name in parts[0]
            },
            **_mean_load(parts, weights),
        }
        for parts in zip(*(s["layers"] for s in texts), strict=True)
    ]


def _mean_load(parts: Sequence[Mapping[str, Any]], weights: Sequence[int]) -> dict[str, Any]:
    """Return the mean of each expert's shares, None for one that is gone.

    Nothing where a part has none: a cell goes on with what an earlier version scored.
    """
    if not all("load" in part for part in parts):
        return {}
    found = np.average(np.array([part["load"] for part in parts], float), axis=0, weights=weights)
    return {"load": [None if np.isnan(share) else round(float(share), 6) for share in found]}


def recovery_columns(teacher: Scores, compressed: Scores, repaired: Scores) -> dict[str, Any]:
    """Return recovery and its error, over all texts and, in `nll_by`, on each of them.

    Both are None where the gap is under two standard errors.
    """
    stages = (teacher, compressed, repaired)
    first, middle, last = (pooled(s, "nll") for s in stages)
    found = recovery_of(first, middle, last, pooled(teacher, "tokens"))
    each = by_text(repaired)
    for name, held in each.items():
        first, middle, last = (s[name]["nll"] for s in stages)
        alone = recovery_of(first, middle, last, teacher[name]["tokens"])
        held |= {"recovery": alone.value, "recovery_se": alone.se}
    return {"recovery": found.value, "recovery_se": found.se, "nll_by": each}
