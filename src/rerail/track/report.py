"""One self-contained page of all results: no network, no account, readable from a file."""

from collections.abc import Sequence
from pathlib import Path

from rerail.files import whole_file
from rerail.track import drawing, sections
from rerail.track.cells import Cell, Setting, cells_of, settings_of
from rerail.track.comparison import comparison
from rerail.track.page import page, tag, text
from rerail.track.results import Row


def write_report(rows: Sequence[Row], path: Path | str, title: str = "rerail") -> Path:
    """Write the page whole or not at all, and return its path.

    Args:
        rows: result rows of any number of cells; none is fine.
        path: the HTML file.
        title: heading of the page.

    Raises:
        InputError: no space is left on the device.
    """
    path = Path(path)
    content = render(rows, title)
    with whole_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return path


def render(rows: Sequence[Row], title: str = "rerail") -> str:
    """Return the page as text."""
    cells = cells_of(rows)
    settings = settings_of(cells)
    done = [cell for cell in cells if cell.done]
    with drawing.style():
        body = [
            sections.overview(cells),
            sections.unfinished(cells),
            sections.over_seeds(settings),
            sections.results(settings),
            sections.by_text(done),
            sections.benchmarks(done),
            sections.routing(settings),
            sections.training(settings),
            sections.continuations(done),
            sections.reproduce(cells),
        ]
    head = tag("header", text("h1", title) + _lead(cells, settings) + sections.contents(body))
    return page(title, head + tag("main", "".join(body)))


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
