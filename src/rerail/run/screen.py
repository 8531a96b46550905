"""What a person sees at the end: the table, one comparison, continuations, and the report's path."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rerail.files import digest
from rerail.track.report import write_report
from rerail.track.results import Row, new_row, read_rows, write_csv, write_rows
from rerail.track.terminal import print_summary


def finish(out: Path, title: str = "rerail") -> Path:
    """Read every row below `out`, print them, and write results.csv and report.html there."""
    rows = read_rows(out)
    write_csv(out / "results.csv", rows)
    path = out / "report.html"
    write_report(rows, path, title)
    print_summary(rows)
    print(f"report: {path}")  # noqa: T201
    return path


def failed_choice(config: Any, command: str, reason: str, out: Path) -> Row:
    """Write and return the row of a cell whose choices could not be understood."""
    choices = OmegaConf.to_container(config, resolve=False)
    assert isinstance(choices, dict)
    key = digest([choices, command])
    row = new_row(status="failed", reason=reason, key=key, choices={"command": command})
    write_rows(out / f"failed-{key[:8]}", [row])
    return row
