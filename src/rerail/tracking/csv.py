"""Cells written to results.csv beside result.json: the default."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rerail.run.mirror import Live
from rerail.run.results import Row, write_csv


@dataclass(frozen=True)
class CsvMirror(Live):
    """Writes the rows of a cell when it ends, and nothing before.

    Attributes:
        folder: of the cell, once it is open.
    """

    folder: Path | None = None

    def open(self, key: str, claim: str | None, config: Mapping[str, Any], folder: Path) -> Live:
        """Begin; the configuration is in the rows' choices already."""
        return replace(self, folder=Path(folder))

    def close(self, status: str, rows: Sequence[Row] = (), reason: str = "") -> None:
        """Write the rows."""
        if rows and self.folder:
            write_csv(self.folder / "results.csv", rows)
