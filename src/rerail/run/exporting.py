"""Write the repaired model and prove that it loads."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rerail.api import save
from rerail.export.checkpoint import is_whole
from rerail.export.reload import check_reload, logits_of
from rerail.export.targets import as_written, check_student
from rerail.files import digest
from rerail.language_model import LanguageModel
from rerail.plan.plan import Plan
from rerail.run.cell import Cell
from rerail.run.results import Row
from rerail.store import Artefact, read, write
from rerail.text.calibration import TokenBlocks

log = logging.getLogger(__name__)


def check_export(cell: Cell, student: LanguageModel) -> None:
    """Check that the student can be written in the chosen form, before it is scored and repaired.

    Raises:
        InputError: it cannot.
    """
    if cell.export.form != "none":
        check_student(student.model, cell.export.form, cell.export.densify)


def add_disk_bytes(cell: Cell, folder: Path, rows: Sequence[Row]) -> None:
    """Fill in the bytes on disk of the teacher (where it is a local folder) and of the export."""
    for row, path in ((rows[0], Path(cell.model.location)), (rows[-1], folder / "model")):
        row.disk_bytes = sum(p.stat().st_size for p in path.glob("*.safetensors")) or None


def export(
    cell: Cell,
    student: LanguageModel,
    texts: Mapping[str, TokenBlocks],
    folder: Path,
    rows: Sequence[Row],
) -> Path:
    """Write `folder / model`, reload it in a fresh process and record how its logits differ.

    An export of the same plan and choices that was proved to reload is used, not made again.
    """
    path, proof = folder / "model", folder / "reload.json"
    plan = student.plan or Plan()
    key = digest([cell.key, plan.fingerprint(), [row["nll"] for row in rows]])
    proved = read(proof)
    if proved is not None and proved.data["key"] == key and is_whole(path):
        return path
    form, densify = cell.export.form, cell.export.densify
    facts = {"choices": dict(cell.choices), "evaluation": [_numbers(row) for row in rows]}
    save(student, path, form, densify, facts)
    ids = next(iter(texts.values())).input_ids[:2, :64]
    # compared with the student as it is rounded on disk; what rounding itself moves stands beside
    written = as_written(student.model, cell.model.stored_dtype(), densify, form)
    difference = check_reload(path, ids, written, form)
    rounding = float((logits_of(written, ids) - logits_of(student.model, ids)).abs().max())
    record = {"key": key, "max_logit_difference": difference, "max_logit_rounding": rounding}
    write(proof, Artefact(record))
    log.info(
        "%s reloads with a largest logit difference of %g; rounding to its dtype moved %g",
        path,
        difference,
        rounding,
    )
    return path


def _numbers(row: Row) -> dict[str, Any]:
    names = ("stage", "nll", "nll_se", "kl", "kl_se", "tokens", "bytes", "recovery")
    return {name: row.get(name) for name in names}
