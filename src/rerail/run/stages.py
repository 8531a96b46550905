"""The stages of a cell: each is scored, looked at, and leaves a row."""

from collections.abc import Mapping
from typing import Any

from rerail import api
from rerail.evaluate.continuation import continuation
from rerail.files import digest
from rerail.run.cell import Cell
from rerail.run.recorder import CellRecorder
from rerail.run.results import Row
from rerail.run.rows import recovery_columns, stage_row
from rerail.text.calibration import TokenBlocks


class Stages:
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
        # of the token blocks themselves: only rows that agree in it may be compared
        self.heldout = digest({name: text.fingerprint for name, text in texts.items()})
        self.rows: list[Row] = []
        self.scores: dict[str, api.Scores] = {}

    def add(self, stage: str, student: api.LanguageModel, **columns: Any) -> None:
        """Score a stage (teacher, compressed or repaired), and show its row with these columns."""
        scores = self.scores[stage] = api.evaluate(
            student,
            self.teacher,
            self.texts,
            reference=self.scores.get("teacher"),
            stage=stage,
            batch_size=self.cell.evaluation.batch_size,
            recorder=self.recorder,
        )
        if stage == "repaired":
            columns |= recovery_columns(self.scores["teacher"], self.scores["compressed"], scores)
        seen = self.recorder.seen(stage, student, lambda: self._look_at(student))
        row = stage_row(
            self.cell,
            stage,
            scores,
            self.recorder.costs[stage],
            student,
            self.teacher,
            samples_text=seen["text"],
            tasks=seen["tasks"],
            heldout=self.heldout,
            **columns,
        )
        self.recorder.live.row(row)
        self.rows.append(row)

    def _look_at(self, student: api.LanguageModel) -> dict[str, Any]:
        """Return what is looked at rather than counted: `text` (the continuation) and `tasks`."""
        model, tokenizer, choices = student.model, student.tokenizer, self.cell.evaluation
        scored = None
        if choices.tasks is not None:
            scored = choices.tasks.evaluate(model.model, tokenizer)
        words = (self.cell.prompt, choices.new_tokens, self.cell.seed)
        return {"text": continuation(model, tokenizer, *words), "tasks": scored}
