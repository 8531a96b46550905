"""Run one cell, one line a step (design, section 5)."""

import functools
import logging
import shutil
import traceback
from pathlib import Path
from typing import Any

from rerail.data.calibration import check_vocabulary
from rerail.errors import InputError, OutOfReach
from rerail.files import digest, read_sealed, write_json, write_sealed
from rerail.moe.layer import MoEModel
from rerail.plan.apply import apply_plan
from rerail.run import stages
from rerail.run.artefacts import Stage, Status, saved
from rerail.run.cell import Cell
from rerail.run.rows import failed_row, provenance, recovery_columns, stage_row
from rerail.track.results import Mirror, Row, read_rows, write_rows

log = logging.getLogger(__name__)

REPAIR_COLUMNS = ("kl_first", "kl_best", "kl_last", "curve", "seconds", "peak_memory")


def run_cell(cell: Cell, out: Path, mirror: Mirror | None = None) -> list[Row]:
    """Run a cell, or return its rows where it is done; all it writes lies in `out / cell.folder`.

    Raises:
        InputError: a value cannot be used; where that shows in the choices, nothing is written.
    """
    folder = out / cell.folder
    cell.check()
    if _same_inputs(cell, folder) and (rows := _finished(folder)):
        log.info("%s is done already", folder.name)
        return rows
    status = Status(folder)
    try:
        rows = _run(cell, folder, status)
    except BaseException as error:
        status.write("failed", "", f"{type(error).__name__}: {error}")
        raise
    write_rows(folder, rows)
    if mirror is not None:
        mirror.log_rows(rows, cell.choices, folder)
    status.write("done")
    return rows


def _same_inputs(cell: Cell, folder: Path) -> bool:
    """Forget a cell that was made from other weights or texts, and note what it is made from."""
    inputs = cell.inputs()
    path = folder / "inputs.json"
    if folder.exists() and read_sealed(path) == inputs:
        return True
    if path.exists():
        log.warning("%s was made from other weights or texts and is made again", folder.name)
        shutil.rmtree(folder)
    write_sealed(path, inputs)
    write_json(folder / "config.json", {"choices": dict(cell.choices), **provenance()})
    return False


def _finished(folder: Path) -> list[Row]:
    if not (folder / "result.json").exists():
        return []
    try:
        rows = read_rows(folder / "result.json")
    except InputError as error:
        log.warning("%s", error)
        return []
    return rows if all(row["status"] == "done" for row in rows) else []


def _run(cell: Cell, folder: Path, status: Status) -> list[Row]:
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
    plan, cost = stages.plan(cell, teacher, blocks, folder)
    step("apply")
    student = apply_plan(teacher, plan)
    if exports := cell.export.form != "none":
        from rerail.run import exporting  # an import that only those who export should wait for

        exporting.check_export(cell, student)
    heldout = digest({name: text.fingerprint for name, text in texts.items()})
    row = functools.partial(
        _row, cell, teacher=teacher, tokenizer=tokenizer, folder=folder, heldout=heldout
    )
    step("evaluate teacher")
    spoken = stages.score_teacher(cell, teacher, texts)
    rows = [row("teacher", spoken[0], teacher)]
    step("evaluate compressed")
    compressed = stages.score_student(
        cell, student, texts, spoken, plan, folder / "compressed.json"
    )
    rows.append(row("compressed", compressed[0], student, **cost))
    if cell.distill.enabled:
        step("repair")
        mended = stages.repair_student(cell, teacher, student, blocks, folder)
        student = stages.refit(cell, student, blocks, folder)
        step("evaluate repaired")
        repaired = stages.score_student(
            cell, student, texts, spoken, plan, folder / "repaired.json"
        )
        extra = {n: mended[0][n] for n in REPAIR_COLUMNS}
        extra |= recovery_columns(spoken[0], compressed[0], repaired[0])
        rows.append(row("repaired", repaired[0], student, **extra))
    if exports:
        step("export")
        exporting.export(cell, student, plan, tokenizer, texts, folder, rows)
        exporting.weigh(cell, folder, rows)
    return rows


def _row(  # noqa: PLR0913
    cell: Cell,
    stage: str,
    scores: Any,
    model: MoEModel,
    *,
    teacher: MoEModel,
    tokenizer: Any,
    folder: Path,
    **extra: Any,
) -> Row:
    """Add what is looked at rather than counted: the continuation, and lm-eval where asked for."""

    def make() -> Stage:
        tasks = None
        if cell.evaluation.tasks is not None:
            tasks = cell.evaluation.tasks.evaluate(model.model, tokenizer)
        return {"text": stages.continuation(cell, model, tokenizer), "tasks": tasks}, {}

    seen = saved(folder / f"{stage}.seen.json", make)[0]
    extra |= {"samples_text": seen["text"], "tasks": seen["tasks"]}
    return stage_row(cell, stage, scores, model, teacher, **extra)


def run_or_record(cell: Cell, out: Path, mirror: Mirror | None = None) -> list[Row]:
    """Run a cell of a sweep; a failure becomes a row, with its traceback kept; the others go on."""
    try:
        return run_cell(cell, out, mirror)
    except InputError as error:
        status = "not_applicable" if isinstance(error, OutOfReach) else "failed"
        row = failed_row(cell, status, str(error))
        Status(out / cell.folder).write(status, "check", str(error))
    except Exception as error:
        row = failed_row(cell, "failed", f"{type(error).__name__}: {error}")
        (out / cell.folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        log.exception("%s failed", cell.folder)
    write_rows(out / cell.folder, [row])
    return [row]
