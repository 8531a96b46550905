"""One self-contained page of all results: no network, no account, readable from a file."""

from collections.abc import Sequence
from pathlib import Path

from rerail.config.secrets import without_secrets
from rerail.errors import InputError
from rerail.files import whole_file
from rerail.report import drawing, paper, sections, tables
from rerail.report.cells import Cell, Setting, cells_of, settings_of
from rerail.report.comparison import comparison
from rerail.report.page import page, tag, text
from rerail.run.results import Row
from rerail.tracking.records import SCALARS


def write_report(
    rows: Sequence[Row],
    path: Path | str,
    title: str = "rerail",
    problems: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Path:
    """Write the page whole or not at all, and return its path.

    Args:
        rows: result rows of any number of cells; none is fine.
        path: the HTML file.
        title: heading of the page.
        problems: sentences about files that could not be read.
        columns: further columns of the rows for the overview.

    Raises:
        InputError: a column does not exist, or no space is left on the device.
    """
    path = Path(path)
    content = render(rows, title, problems, columns)
    with whole_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return path


def render(
    rows: Sequence[Row],
    title: str = "rerail",
    problems: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> str:
    """Return the page as text; arguments and errors as `write_report`."""
    check_columns(columns)
    cells = cells_of(rows)
    settings = settings_of(cells)
    done = [cell for cell in cells if cell.done]
    with drawing.style():
        body = [
            tables.problems(problems),
            tables.overview(cells, columns),
            tables.unfinished(cells),
            sections.results(settings),
            sections.over_seeds(settings),
            tables.sizes(done),
            tables.by_text(done),
            tables.benchmarks(done),
            paper.beside(done),
            sections.routing(settings),
            sections.training(settings),
            sections.continuations(done),
            tables.reproduce(cells),
        ]
    head = tag("header", text("h1", title) + _lead(cells, settings) + sections.contents(body))
    whole: str = without_secrets(page(title, head + tag("main", "".join(body))))
    return whole


def check_columns(columns: Sequence[str]) -> None:
    """Raise InputError for a column that does not exist or holds no plain value."""
    for name in columns:
        if name not in SCALARS:
            raise InputError(f"column {name} does not exist; allowed: {', '.join(SCALARS)}")


def _lead(cells: Sequence[Cell], settings: Sequence[Setting]) -> str:
    """Return what the page holds, in two sentences."""
    counts = {
        status.replace("_", " "): sum(cell.head["status"] == status for cell in cells)
        for status in ("done", "failed", "not_applicable")
    }
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    lead = text("p", f"{len(cells)} cells: {said}." if cells else "No cells.")
    compared = comparison(settings)
    return lead + (text("p", compared[0].upper() + compared[1:]) if compared else "")
