"""Run one cell, one line a step (design, section 5)."""

import contextlib
import functools
import logging
import shutil
import traceback
import uuid
from pathlib import Path
from typing import Any

from rerail.errors import InputError, OutOfReach
from rerail.files import digest, whole_file, write_json
from rerail.moe.model import MoEModel
from rerail.parallel import (
    broadcast_from_first,
    check_processes,
    is_first,
    join,
    rank_and_size,
    run_on_first,
)
from rerail.plan.apply import apply_plan
from rerail.run import stages
from rerail.run.cell import Cell
from rerail.run.mirror import Live, Mirror
from rerail.run.progress import told_to
from rerail.run.results import Row, read_rows, write_rows
from rerail.run.rows import failed_row, provenance, recovery_columns, stage_row
from rerail.run.status import Status
from rerail.store import Artefact, read, write
from rerail.text.calibration import TokenBlocks, check_vocabulary

log = logging.getLogger(__name__)

INPUTS, TRACEBACK = "inputs.json", "traceback.txt"
REPAIR_COLUMNS = ("kl_first", "kl_best", "kl_last", "curve", "seconds", "peak_memory")


def run_cell(cell: Cell, out: Path, mirror: Mirror | None = None) -> list[Row]:
    """Run a cell, or return its rows where it is done; all it writes lies in `out / cell.folder`.

    Raises:
        InputError: a value cannot be used; where that shows in the choices, nothing is written.
    """
    folder = out / cell.folder
    cell.check()
    check_processes(cell.trainer)
    join()
    if rows := broadcast_from_first(
        lambda: _finished(folder) if _same_inputs(cell, folder) else []
    ):
        log.info("%s is done already", folder.name)
        return _shown(_live(cell, folder, mirror), rows)
    status = Status(folder)
    live = _live(cell, folder, mirror)
    try:
        with told_to(status):
            rows = _run(cell, folder, status, live)
    except SystemExit:
        raise  # preempted: the next start of the job goes on from here
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        status.write("failed", status.stage, reason)
        live.close("failed", reason=reason)
        raise
    if is_first():
        write_rows(folder, rows)
        _shown(live, rows)
        (folder / TRACEBACK).unlink(missing_ok=True)
    status.write("done")
    return rows


def standing(cell: Cell, out: Path) -> tuple[str, str]:
    """Return how a cell stands before it is submitted, and the reason where it cannot run.

    That is `done`, `open`, or `failed` and `not_applicable`, which leave their row.
    """
    folder = out / cell.folder
    try:
        cell.check()
        inputs = cell.inputs()
    except InputError as error:
        row = _refused(cell, out, error)
        return row["status"], row["reason"]
    same = folder.exists() and _made_from(folder) == inputs
    return ("done", "") if same and _finished(folder) else ("open", "")


def _live(cell: Cell, folder: Path, mirror: Mirror | None) -> Live:
    """Begin to show the cell, or go on with it."""
    if mirror is None or not is_first():
        return Live()
    config = {"choices": dict(cell.choices), **provenance()}
    return mirror.open(cell.key, cell.names.get("experiments"), config, folder)


def _shown(live: Live, rows: list[Row]) -> list[Row]:
    """Return the rows of a cell that is done, after showing what was not shown yet."""
    for row in rows:
        live.row(row)
    live.close("done", rows)
    return rows


def _same_inputs(cell: Cell, folder: Path) -> bool:
    """Forget a cell that was made from other weights or texts, and note what it is made from."""
    inputs = cell.inputs()
    path = folder / INPUTS
    if folder.exists() and _made_from(folder) == inputs:
        return True
    if path.exists() and _made_from(folder) != inputs:  # not by another process just now
        log.warning("%s was made from other weights or texts and is made again", folder.name)
        _forget(folder)
    write(path, Artefact(inputs))
    write_json(folder / "config.json", {"choices": dict(cell.choices), **provenance()})
    return False


def _made_from(folder: Path) -> Any:
    stored = read(folder / INPUTS)
    return stored and stored.data


def _forget(folder: Path) -> None:
    """Remove a folder, out of sight first: another process may begin the same cell meanwhile."""
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _finished(folder: Path) -> list[Row]:
    if not (folder / "result.json").exists():
        return []
    try:
        rows = read_rows(folder / "result.json")
    except InputError as error:
        log.warning("%s", error)
        return []
    return rows if all(row["status"] == "done" for row in rows) else []


def _run(cell: Cell, folder: Path, status: Status, live: Live) -> list[Row]:
    def step(name: str) -> None:
        log.info("%s: %s", folder.name, name)
        status.write("running", name)

    step("text")
    tokenizer = cell.model.tokenizer()
    check_vocabulary(tokenizer, cell.model.meta().vocab_size)
    texts, blocks = broadcast_from_first(lambda: _texts(cell, tokenizer))
    step("load")
    teacher = cell.model.load()
    if blocks is None:
        blocks = broadcast_from_first(lambda: cell.calibration.blocks(tokenizer, teacher.model))
    step("plan")
    plan, cost = stages.plan(cell, teacher, blocks, folder)
    step("apply")
    student = apply_plan(teacher, plan)
    if exports := cell.export.form != "none":
        from rerail.run import exporting  # an import that only those who export should wait for

        exporting.check_export(cell, student)
    heldout = digest({name: text.fingerprint for name, text in texts.items()})
    row = functools.partial(
        _row, cell, live, teacher=teacher, tokenizer=tokenizer, folder=folder, heldout=heldout
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
        mended = stages.repair_student(cell, teacher, student, blocks, folder, live.point)
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
        run_on_first(lambda: exporting.export(cell, student, plan, tokenizer, texts, folder, rows))
        run_on_first(lambda: exporting.weigh(cell, folder, rows))
    return rows


def _texts(cell: Cell, tokenizer: Any) -> tuple[dict[str, TokenBlocks], TokenBlocks | None]:
    """Return the held-out texts, and the calibration text unless the teacher must speak it."""
    texts = {name: text.blocks(tokenizer) for name, text in cell.evaluation.texts.items()}
    return texts, None if cell.calibration.needs_model else cell.calibration.blocks(tokenizer)


def _row(  # noqa: PLR0913
    cell: Cell,
    live: Live,
    stage: str,
    scores: Any,
    model: MoEModel,
    *,
    teacher: MoEModel,
    tokenizer: Any,
    folder: Path,
    **extra: Any,
) -> Row:
    """Add what is looked at rather than counted, and show the row."""
    seen = stages.seen(cell, stage, model, tokenizer, folder)
    extra |= {"samples_text": seen["text"], "tasks": seen["tasks"]}
    found = stage_row(cell, stage, scores, model, teacher, **extra)
    live.row(found)
    return found


def run_or_record(cell: Cell, out: Path, mirror: Mirror | None = None) -> list[Row]:
    """Run a cell of a sweep; a failure becomes a row, with its traceback kept; the others go on."""
    try:
        return run_cell(cell, out, mirror)
    except InputError as error:
        return [_refused(cell, out, error)]
    except Exception as error:
        if rank_and_size()[1] == 1 and (rows := _finished(out / cell.folder)):
            Status(out / cell.folder).write("done")  # another process ran the same cell
            return rows
        if is_first():
            with whole_file(out / cell.folder / TRACEBACK) as temporary:
                temporary.write_text(traceback.format_exc(), encoding="utf-8")
        log.exception("%s failed", cell.folder)
        row = _recorded(cell, out, "failed", f"{type(error).__name__}: {error}")
        if rank_and_size()[1] > 1:
            raise  # the others wait for this process: end them, too
        return [row]


def _refused(cell: Cell, out: Path, error: InputError) -> Row:
    """Record that a value cannot be used; a ratio out of reach is no failure."""
    status = "not_applicable" if isinstance(error, OutOfReach) else "failed"
    Status(out / cell.folder).write(status, "check", str(error))
    return _recorded(cell, out, status, str(error))


def _recorded(cell: Cell, out: Path, status: str, reason: str) -> Row:
    row = failed_row(cell, status, reason)
    if is_first():
        write_rows(out / cell.folder, [row])
    return row
