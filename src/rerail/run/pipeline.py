"""Run one cell, one line a step: `rerail.api` behind a recorder, and the rows."""

import functools
import logging
import traceback
from dataclasses import asdict
from pathlib import Path

from rerail import api
from rerail.config.secrets import redacted
from rerail.distill.making import check_machine
from rerail.distill.settings import RouterKD
from rerail.distill.trainer import check_processes
from rerail.errors import InputError
from rerail.files import cache_dir, is_folder, make_folder, whole_file
from rerail.parallel import (
    broadcast_from_first,
    is_first,
    join,
    rank_and_size,
    run_on_first,
)
from rerail.run.cell import Cell
from rerail.run.cost import freeze_imports
from rerail.run.folder import (
    TRACEBACK,
    finished_rows,
    if_it_can_be_written,
    made_from,
    rows_if_current,
    write_failure,
    write_refusal,
)
from rerail.run.lock import only_process
from rerail.run.mirror import Live, Mirror
from rerail.run.provenance import provenance
from rerail.run.recorder import CellRecorder
from rerail.run.results import Row, write_rows
from rerail.run.rows import repair_columns
from rerail.run.stages import Stages
from rerail.run.status import Status
from rerail.text.calibration import TokenBlocks, check_vocabulary

log = logging.getLogger(__name__)


def run_cell(cell: Cell, out: Path, mirror: Mirror | None = None) -> list[Row]:
    """Run a cell, or return its rows where it is done; all it writes lies in `out / cell.folder`.

    Raises:
        InputError: a value cannot be used; where that shows in the choices, nothing is written.
    """
    folder = out / cell.folder
    cell.check()
    make_folder(cache_dir())
    check_processes(cell.trainer)
    if cell.distill.enabled and isinstance(cell.distill, RouterKD):
        check_machine(cell.trainer, cell.schedule, cell.distill)
    join()
    freeze_imports()
    with only_process(folder):
        return _run_or_return(cell, folder, mirror)


def _run_or_return(cell: Cell, folder: Path, mirror: Mirror | None) -> list[Row]:
    """Run a cell that no other process works on, or return its rows where it is done."""
    # the first process decides for all: another may see a file of the folder sooner or later
    if rows := broadcast_from_first(lambda: rows_if_current(cell, folder)):
        log.info("%s is done already", folder.name)
        _show(_live(cell, folder, mirror), rows)
        return rows
    status = Status(folder)
    live = _live(cell, folder, mirror)
    try:
        made = _run(cell, CellRecorder(cell, folder, status, live))
    except SystemExit:
        raise  # preempted: the next start of the job goes on from here
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        status.fail(reason)
        live.close("failed", reason=reason)
        raise
    rows = broadcast_from_first(lambda: made)  # those that are written, on every process
    if is_first():
        write_rows(folder, rows)
        _show(live, rows)
        (folder / TRACEBACK).unlink(missing_ok=True)
    status.write("done")
    return rows


def _run(cell: Cell, recorder: CellRecorder) -> list[Row]:
    step, batch_size = recorder.step, cell.calibration.batch_size
    step("text")
    heldout, text = broadcast_from_first(lambda: _texts(cell, recorder))
    step("load")
    teacher = api.load(cell.model)
    if text is None:
        text = broadcast_from_first(lambda: api.text(teacher, cell.calibration))
    step("plan")
    plan = api.plan(
        teacher,
        cell.compressor,
        cell.budget,
        text,
        allocation=cell.allocation,
        batch_size=batch_size,
        recorder=recorder,
    )
    step("apply")
    student = api.apply(teacher, plan, cell.compressor, cell.budget)
    if exports := cell.export.form != "none":
        from rerail.run import exporting  # an import that only those who export should wait for

        exporting.check_export(cell, student)
    stages = Stages(cell, teacher, heldout, recorder)
    step("evaluate teacher")
    stages.add("teacher", teacher)
    step("evaluate compressed")
    stages.add("compressed", student, **asdict(recorder.costs["plan"]))
    if cell.distill.enabled:
        step("repair")
        repaired = api.repair(
            student,
            teacher,
            text,
            cell.distill,
            trainer=cell.trainer,
            seed=cell.seed,
            teacher_batch_size=batch_size,
            recorder=recorder,
        )
        student = repaired.student
        step("evaluate repaired")
        stages.add("repaired", student, **repair_columns(repaired.fit, recorder.costs["repair"]))
    if exports:
        step("export")
        run_on_first(lambda: exporting.export(cell, student, heldout, recorder.folder, stages.rows))
        run_on_first(lambda: exporting.add_disk_bytes(cell, recorder.folder, stages.rows))
    return stages.rows


def _texts(cell: Cell, recorder: CellRecorder) -> tuple[dict[str, TokenBlocks], TokenBlocks | None]:
    """Return the held-out texts, and the calibration text unless the teacher must write it.

    Raises:
        InputError: there is too little text, which shows here before weights load.
    """
    tokenizer = cell.model.tokenizer()
    check_vocabulary(tokenizer, cell.model.meta().vocab_size)
    blocks = functools.partial(api.text, tokenizer, recorder=recorder)
    heldout = {name: blocks(text) for name, text in cell.evaluation.texts.items()}
    return heldout, None if cell.calibration.needs_model else blocks(cell.calibration)


def _live(cell: Cell, folder: Path, mirror: Mirror | None) -> Live:
    """Begin to show the cell, or go on with it."""
    if mirror is None or not is_first():
        return Live()
    config = {"choices": dict(cell.choices), **provenance()}
    return mirror.open(cell.key, cell.names.get("experiments"), config, folder)


def _show(live: Live, rows: list[Row]) -> None:
    """Show what was not shown yet of a cell that is done."""
    for row in rows:
        live.row(row)
    live.close("done", rows)


def standing(cell: Cell, out: Path) -> tuple[str, str]:
    """Return how a cell stands before it is submitted, and the reason where it cannot run.

    That is `done`, `open`, or `failed` and `not_applicable`, which leave their row.
    """
    folder = out / cell.folder
    try:
        cell.check()
        inputs = cell.inputs()
    except InputError as error:
        row = write_refusal(cell, folder, error)
        return row["status"], row["reason"]
    done = is_folder(folder) and made_from(folder) == inputs and finished_rows(folder)
    return ("done" if done else "open"), ""


def run_or_record(cell: Cell, out: Path, mirror: Mirror | None = None) -> list[Row]:
    """Run a cell of a sweep; a failure becomes a row, with its traceback kept; the others go on."""
    folder, several = out / cell.folder, rank_and_size()[1] > 1
    try:
        return run_cell(cell, out, mirror)
    except InputError as error:
        return [write_refusal(cell, folder, error)]
    except Exception as error:
        if not several and (rows := finished_rows(folder)):
            Status(folder).write("done")  # another process ran the same cell
            return rows
        if is_first():
            with if_it_can_be_written(), whole_file(folder / TRACEBACK) as temporary:
                temporary.write_text(redacted(traceback.format_exc()), encoding="utf-8")
        log.exception("%s failed", cell.folder)
        row = write_failure(cell, folder, "failed", f"{type(error).__name__}: {error}")
        if several:
            raise  # the others wait for this process: end them, too
        return [row]
