"""Run one cell, one line a step: `rerail.api` behind a recorder, and the rows."""

import contextlib
import logging
import shutil
import traceback
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rerail import api
from rerail.config.secrets import redacted
from rerail.distill.trainer import check_accelerator
from rerail.errors import InputError, OutOfReach
from rerail.evaluate.continuation import continuation
from rerail.files import digest, whole_file, write_json
from rerail.parallel import (
    broadcast_from_first,
    check_processes,
    is_first,
    join,
    rank_and_size,
    run_on_first,
)
from rerail.run.cell import Cell
from rerail.run.mirror import Live, Mirror
from rerail.run.progress import reporting_to
from rerail.run.provenance import provenance
from rerail.run.recorder import CellRecorder
from rerail.run.results import Row, read_rows, write_rows
from rerail.run.rows import failed_row, plan_columns, recovery_columns, repair_columns, stage_row
from rerail.run.status import Status
from rerail.store import Artefact, read, write
from rerail.text.calibration import TokenBlocks, check_vocabulary

log = logging.getLogger(__name__)

INPUTS, TRACEBACK = "inputs.json", "traceback.txt"


def run_cell(cell: Cell, out: Path, mirror: Mirror | None = None) -> list[Row]:
    """Run a cell, or return its rows where it is done; all it writes lies in `out / cell.folder`.

    Raises:
        InputError: a value cannot be used; where that shows in the choices, nothing is written.
    """
    folder = out / cell.folder
    cell.check()
    check_processes(cell.trainer)
    if cell.distill.enabled:
        check_accelerator(cell.trainer)
    join()
    if rows := broadcast_from_first(
        lambda: _finished(folder) if _same_inputs(cell, folder) else []
    ):
        log.info("%s is done already", folder.name)
        return _shown(_live(cell, folder, mirror), rows)
    status = Status(folder)
    live = _live(cell, folder, mirror)
    try:
        with reporting_to(status):
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

    recorder = CellRecorder(cell, folder, live)
    step("text")
    tokenizer = cell.model.tokenizer()
    check_vocabulary(tokenizer, cell.model.meta().vocab_size)
    texts, blocks = broadcast_from_first(lambda: _texts(cell, tokenizer))
    step("load")
    teacher = api.load(cell.model)
    if blocks is None:
        blocks = broadcast_from_first(lambda: api.text(teacher, cell.calibration))
    step("plan")
    choices = cell.compressor, cell.budget
    options: dict[str, Any] = {"allocation": cell.allocation, "recorder": recorder}
    options |= {"batch_size": cell.calibration.batch_size}
    plan = api.plan(teacher, *choices, blocks, **options)
    step("apply")
    student = api.apply(teacher, plan, *choices)
    if exports := cell.export.form != "none":
        from rerail.run import exporting  # an import that only those who export should wait for

        exporting.check_export(cell, student)
    results = ResultRows(cell, teacher, texts, recorder)
    step("evaluate teacher")
    results.add("teacher", teacher)
    step("evaluate compressed")
    results.add("compressed", student, **plan_columns(recorder.costs["plan"]))
    if cell.distill.enabled:
        step("repair")
        options = {"trainer": cell.trainer, "seed": cell.seed, "recorder": recorder}
        options |= {"teacher_batch_size": cell.calibration.batch_size}
        repaired = api.repair(student, teacher, blocks, cell.distill, **options)
        student = repaired.student
        step("evaluate repaired")
        results.add("repaired", student, **repair_columns(repaired.fit, recorder.costs["repair"]))
    if exports:
        step("export")
        run_on_first(lambda: exporting.export(cell, student, texts, folder, results.rows))
        run_on_first(lambda: exporting.add_disk_bytes(cell, folder, results.rows))
    return results.rows


def _texts(cell: Cell, tokenizer: Any) -> tuple[dict[str, TokenBlocks], TokenBlocks | None]:
    """Return the held-out texts, and the calibration text unless the teacher must write it."""
    texts = {name: api.text(tokenizer, text) for name, text in cell.evaluation.texts.items()}
    written = cell.calibration.needs_model
    return texts, None if written else api.text(tokenizer, cell.calibration)


class ResultRows:
    """Scores the stages of a cell one after another, and shows their rows.

    Args:
        cell: its choices.
        teacher: the original model.
        texts: held-out texts by name.
        recorder: of the cell.

    Attributes:
        rows: of the stages so far.
        scores: of the stages so far, by name.
    """

    def __init__(
        self,
        cell: Cell,
        teacher: api.LanguageModel,
        texts: Mapping[str, TokenBlocks],
        recorder: CellRecorder,
    ):
        self.cell, self.teacher, self.texts, self.recorder = cell, teacher, texts, recorder
        self.heldout = digest({name: text.fingerprint for name, text in texts.items()})
        self.rows: list[Row] = []
        self.scores: dict[str, api.Scores] = {}

    def add(self, stage: str, student: api.LanguageModel, **extra: Any) -> None:
        """Score a stage and show its row with these columns."""
        cell, recorder = self.cell, self.recorder
        scores = self.scores[stage] = api.evaluate(
            student,
            self.teacher,
            self.texts,
            reference=self.scores.get("teacher"),
            stage=stage,
            batch_size=cell.evaluation.batch_size,
            recorder=recorder,
        )
        if stage == "repaired":
            extra |= recovery_columns(self.scores["teacher"], self.scores["compressed"], scores)
        seen = recorder.seen(stage, student, lambda: _seen(cell, student))
        extra |= {"samples_text": seen["text"], "tasks": seen["tasks"], "heldout": self.heldout}
        cost = recorder.costs[stage]
        row = stage_row(cell, stage, scores, cost, student, self.teacher, **extra)
        recorder.live.row(row)
        self.rows.append(row)


def _seen(cell: Cell, model: api.LanguageModel) -> dict[str, Any]:
    """Return what is looked at rather than counted: `text` (the continuation) and `tasks`."""
    choices = cell.evaluation
    scored = None
    if choices.tasks is not None:
        scored = choices.tasks.evaluate(model.model.model, model.tokenizer)
    words = (cell.prompt, choices.new_tokens, cell.seed)
    return {"text": continuation(model.model, model.tokenizer, *words), "tasks": scored}


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
                temporary.write_text(redacted(traceback.format_exc()), encoding="utf-8")
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
