"""Mirrors show a cell somewhere else while it runs; result.json stays the truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rerail.run.results import Row


class Live:
    """A cell that is being shown; this one shows nothing."""

    def point(self, point: Mapping[str, float]) -> None:
        """Show a point of the repair: {step, batch_kl} or {step, train_kl, val_kl}, nats a token.

        A point that was shown before, by a process that did not finish, is not shown again.
        """

    def row(self, row: Row) -> None:
        """Show the row of a stage that ended; one that was shown before is not shown again."""

    def close(self, status: str, rows: Sequence[Row] = (), reason: str = "") -> None:
        """End: `done` with the rows of result.json, or `failed` with the reason."""


@runtime_checkable
class Mirror(Protocol):
    """Where cells are shown."""

    def open(self, key: str, claim: str | None, config: Mapping[str, Any], folder: Path) -> Live:
        """Begin to show a cell, or go on with it.

        Args:
            key: of the cell.
            claim: the experiment it belongs to, if any.
            config: choices, git revision and versions.
            folder: where its result.json will lie.
        """
