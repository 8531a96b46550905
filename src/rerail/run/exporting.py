"""Write the repaired model and prove that it loads."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rerail.data.calibration import TokenBlocks
from rerail.export.native import check_reload, export_native
from rerail.files import write_json
from rerail.moe.layer import MoEModel
from rerail.plan.plan import Plan
from rerail.run.cell import Cell
from rerail.track.results import Row

log = logging.getLogger(__name__)


@torch.no_grad()
def export(  # noqa: PLR0913
    cell: Cell,
    student: MoEModel,
    plan: Plan,
    tokenizer: Any,
    texts: dict[str, TokenBlocks],
    folder: Path,
    rows: Sequence[Row],
) -> Path:
    """Write `folder / model`, reload it in a fresh process and record the difference of the logits."""
    numbers = {
        r["stage"]: {n: r[n] for n in ("nll", "nll_se", "kl", "tokens", "bytes")} for r in rows
    }
    manifest = {
        "choices": dict(cell.choices),
        "parent": cell.model.fingerprint(),
        "evaluation": numbers,
    }
    path = export_native(
        student,
        plan,
        folder / "model",
        tokenizer=tokenizer,
        manifest=manifest,
        densify=cell.export.densify,
    )
    ids = next(iter(texts.values())).input_ids[:2, :64]
    difference = check_reload(path, ids, student.model(input_ids=ids).logits)
    write_json(folder / "reload.json", {"max_logit_difference": difference})
    log.info("%s reloads with a largest logit difference of %g", path, difference)
    return path
