"""Run one cell, one line a step (design, section 5)."""

import logging
import traceback
from pathlib import Path
from typing import Any

from rerail.data.calibration import check_vocabulary
from rerail.errors import InputError
from rerail.files import write_json
from rerail.moe.layer import MoEModel
from rerail.plan.apply import apply_plan
from rerail.run import stages
from rerail.run.artefacts import Stage, Status, saved
from rerail.run.cell import Cell
from rerail.run.exporting import export
from rerail.run.rows import failed_row, recovery_columns, stage_row
from rerail.track.results import Mirror, Row, read_rows, write_rows

log = logging.getLogger(__name__)


def run_cell(cell: Cell, out: Path, mirror: Mirror | None = None) -> list[Row]:
    """Run a cell, or return its rows where it is done; rows and artefacts lie in `out / cell.folder`.

    Raises:
        InputError: a value cannot be used; nothing but the status file is left behind.
    """
    folder = out / cell.folder
    if (folder / "result.json").exists():
        rows = read_rows(folder / "result.json")
        if all(row["status"] == "done" for row in rows):
            log.info("%s is done already", folder.name)
            return rows
    status = Status(folder)
    try:
        status.write("running", "check")
        rows = _run(cell, folder, status)
    except BaseException as error:
        status.write("failed", "", f"{type(error).__name__}: {error}")
        raise
    write_rows(folder, rows)
    if mirror is not None:
        mirror.log_rows(rows, cell.choices, folder)
    status.write("done")
    return rows


def _run(cell: Cell, folder: Path, status: Status) -> list[Row]:
    cell.check()
    write_json(folder / "config.json", dict(cell.choices))

    def step(name: str) -> None:
        log.info("%s: %s", folder.name, name)
        status.write("running", name)

    step("text")
    tokenizer = cell.model.tokenizer()
    check_vocabulary(tokenizer, cell.model.meta().vocab_size)
    texts = {name: text.blocks(tokenizer) for name, text in cell.evaluation.texts.items()}
    blocks = None if cell.calibration.needs_model else cell.calibration.blocks(tokenizer)
    step("load")
    teacher = cell.model.load()
    if blocks is None:
        blocks = cell.calibration.blocks(tokenizer, teacher.model)
    step("plan")
    plan = stages.plan(cell, teacher, blocks, folder)
    step("apply")
    student = apply_plan(teacher, plan)
    step("evaluate teacher")
    spoken = stages.score_teacher(cell, teacher, texts)
    rows = [_row(cell, "teacher", spoken[0], teacher, teacher, tokenizer, folder)]
    step("evaluate compressed")
    compressed = stages.score_student(
        cell, student, texts, spoken, plan, folder / "compressed.json"
    )
    rows.append(_row(cell, "compressed", compressed[0], student, teacher, tokenizer, folder))
    if cell.distill.enabled:
        step("repair")
        mended = stages.repair_student(cell, teacher, student, blocks, folder)
        step("evaluate repaired")
        repaired = stages.score_student(
            cell, student, texts, spoken, plan, folder / "repaired.json"
        )
        extra: dict[str, Any] = {
            n: mended[0][n] for n in ("kl_first", "kl_best", "kl_last", "curve")
        }
        extra |= recovery_columns(spoken[0], compressed[0], repaired[0])
        row = _row(cell, "repaired", repaired[0], student, teacher, tokenizer, folder, **extra)
        row["seconds"] = mended[0]["seconds"]
        rows.append(row)
    if cell.export.form != "none":
        step("export")
        export(cell, student, plan, tokenizer, texts, folder, rows)
    return rows


def _row(  # noqa: PLR0913
    cell: Cell,
    stage: str,
    scores: Any,
    model: MoEModel,
    teacher: MoEModel,
    tokenizer: Any,
    folder: Path,
    **extra: Any,
) -> Row:
    """Add what is looked at rather than counted: the continuation, and lm-eval where it was asked for."""

    def make() -> Stage:
        tasks = None
        if cell.evaluation.tasks is not None:
            tasks = cell.evaluation.tasks.evaluate(model.model, tokenizer)
        return {"text": stages.continuation(cell, model, tokenizer), "tasks": tasks}, {}

    seen = saved(folder / f"{stage}.seen.json", make)[0]
    return stage_row(
        cell, stage, scores, model, teacher, samples_text=seen["text"], tasks=seen["tasks"], **extra
    )


def run_or_record(cell: Cell, out: Path, mirror: Mirror | None = None) -> list[Row]:
    """Run a cell of a sweep; a failure becomes a row, with its traceback kept, and the others go on."""
    try:
        return run_cell(cell, out, mirror)
    except InputError as error:
        row = failed_row(cell, _kind(error), str(error))
    except Exception as error:
        row = failed_row(cell, "failed", f"{type(error).__name__}: {error}")
        (out / cell.folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        log.exception("%s failed", cell.folder)
    write_rows(out / cell.folder, [row])
    return [row]


def _kind(error: InputError) -> str:
    return (
        "not_applicable"
        if "allowed ratios" in str(error) or "can be reached" in str(error)
        else "failed"
    )
