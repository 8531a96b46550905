"""Write the repaired model and prove that it loads."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rerail.export.manifest import is_whole
from rerail.export.native import stored_dtype
from rerail.export.reload import check_reload, logits_of
from rerail.export.targets import as_written, check_student, export_student
from rerail.files import digest, read_sealed, write_sealed
from rerail.moe.model import MoEModel
from rerail.plan.plan import Plan
from rerail.run.cell import Cell
from rerail.run.results import Row
from rerail.text.calibration import TokenBlocks

log = logging.getLogger(__name__)


def check_export(cell: Cell, student: MoEModel) -> None:
    """Check that the student can be written in the chosen form, before it is scored and repaired.

    Raises:
        InputError: it cannot.
    """
    if cell.export.form != "none":
        check_student(student, cell.export.form, cell.export.densify)


def weigh(cell: Cell, folder: Path, rows: Sequence[Row]) -> None:
    """Put the bytes on disk of the teacher (where it is a local folder) and of the export down."""
    for row, path in ((rows[0], Path(cell.model.location)), (rows[-1], folder / "model")):
        row.disk_bytes = sum(p.stat().st_size for p in path.glob("*.safetensors")) or None


def export(  # noqa: PLR0913
    cell: Cell,
    student: MoEModel,
    plan: Plan,
    tokenizer: Any,
    texts: dict[str, TokenBlocks],
    folder: Path,
    rows: Sequence[Row],
) -> Path:
    """Write `folder / model`, reload it in a fresh process and record how its logits differ.

    An export of the same plan and choices that was proved to reload is used, not made again.
    """
    path, proof = folder / "model", folder / "reload.json"
    key = digest([cell.key, plan.fingerprint(), [row["nll"] for row in rows]])
    held = read_sealed(proof)
    if held is not None and held["key"] == key and is_whole(path):
        return path
    dtype, form, densify = stored_dtype(cell.model), cell.export.form, cell.export.densify
    manifest = {
        "choices": dict(cell.choices),
        "parent": {"model": cell.model.path_or_id, "fingerprint": cell.model.fingerprint()},
        "evaluation": [_numbers(row) for row in rows],
    }
    options: dict[str, Any] = {"form": form, "densify": densify, "dtype": dtype}
    export_student(student, plan, path, tokenizer=tokenizer, manifest=manifest, **options)
    ids = next(iter(texts.values())).input_ids[:2, :64]
    written = as_written(student, **options)
    difference = check_reload(path, ids, written, form)
    rounding = float((logits_of(written, ids) - logits_of(student, ids)).abs().max())
    record = {"key": key, "max_logit_difference": difference, "max_logit_rounding": rounding}
    write_sealed(proof, record)
    message = "%s reloads with a largest logit difference of %g; rounding to its dtype moved %g"
    log.info(message, path, difference, rounding)
    return path


def _numbers(row: Row) -> dict[str, Any]:
    names = ("stage", "nll", "nll_se", "kl", "kl_se", "tokens", "bytes", "recovery")
    return {name: row.get(name) for name in names}
