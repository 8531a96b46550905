"""One self-contained page of all results: no network, no account, readable from a file."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from rerail.config.secrets import without_secrets
from rerail.errors import InputError
from rerail.files import whole_file
from rerail.report import charts, paper, routing_charts, tables
from rerail.report.cells import Cell, Fields, grouped
from rerail.report.chart import Chart
from rerail.report.comparison import comparison
from rerail.report.frame import MANY, Results, columns_of, varying
from rerail.report.words import form, interval, megabytes, percent, plus_minus, share
from rerail.run.results import SCALARS, STAGES
from rerail.run.settings import number, tokens_label


def write_report(
    rows: Sequence[Fields],
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
    rows: Sequence[Fields],
    title: str = "rerail",
    problems: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> str:
    """Return the page as text; arguments and errors as `write_report`."""
    check_columns(columns)
    results = Results.of(rows)
    cells, done, settings = results.cells, results.done, results.settings
    content = _template().render(
        title=title,
        lead=_lead(results),
        problems=problems,
        columns=list(columns),
        cells=cells,
        done=done,
        fields=columns_of(cells),
        quality=list(_quality(results)),
        varied=any(varying(part) for _, part in settings.groupby("tokens")),
        means=tables.means(results),
        forest=list(charts.forest(results, settings)),
        differences=tables.differences(results),
        sizes=tables.sizes(done),
        texts=[(cell, *scores) for cell in done for scores in cell.texts.items()],
        tasks=[(cell, *scores) for cell in done for scores in cell.tasks.items()],
        paper=paper.data(),
        printed=paper.beside(done),
        routing=[*routing_charts.heat_maps(settings), *routing_charts.load_maps(settings)],
        training=list(routing_charts.training_curves(settings)),
        continuations=_continuations(done),
    )
    return str(without_secrets(content))


def _template() -> Template:
    """Return the template of the page; nothing that it shows is loaded from anywhere."""
    environment = Environment(
        loader=PackageLoader("rerail.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    numbers = itertools.count()
    # each drawing has a name of its own, that ids of the page may differ; matplotlib escapes texts
    drawn = {"svg": lambda chart: Markup(chart.svg(f"f{next(numbers)}"))}
    written = {f.__name__: f for f in (form, interval, megabytes, number, percent, plus_minus)}
    folded = {"grouped": lambda made: grouped(made, [chart.group for chart in made]).items()}
    environment.filters |= drawn | written | folded
    environment.filters |= {"share": share, "by_stage": tables.by_stage}
    environment.globals["STAGES"] = STAGES
    return environment.get_template("page.html.jinja")


def check_columns(columns: Sequence[str]) -> None:
    """Raise InputError for a column that does not exist or holds no plain value."""
    for name in columns:
        if name not in SCALARS:
            raise InputError(f"column {name} does not exist; allowed: {', '.join(SCALARS)}")


def _lead(results: Results) -> list[str]:
    """Return what the page holds, in two sentences."""
    statuses = pd.Series([cell.status for cell in results.cells], dtype=object).value_counts()
    order = ("done", "failed", "not applicable")
    counts = ", ".join(f"{statuses[name]} {name}" for name in order if name in statuses)
    lead = [f"{len(results.cells)} cells: {counts}." if results.cells else "No cells."]
    compared = comparison(results)
    return [*lead, compared[0].upper() + compared[1:]] if compared else lead


def _quality(results: Results) -> Iterator[tuple[str, list[tuple[str, list[Chart]]]]]:
    """Yield each set of held-out tokens in words, and its figures under their headings."""
    for _, group in results.settings.groupby("tokens", sort=False):
        made = (
            ("", charts.pareto(results, group)),
            ("Recovery, fine against coarse", charts.fine_against_coarse(results, group)),
            ("Before and after the repair", charts.before_after(results, group)),
            ("Against the removed share", charts.recovery_over("ratio", results, group)),
            ("Against bits", charts.loss_over("bits", results, group)),
            ("", charts.recovery_over("bits", results, group)),
            ("Against skipped experts", charts.loss_over("active_experts", results, group)),
            ("Against the calibration size", charts.recovery_over("samples", results, group)),
            ("By calibration text", charts.by_calibration(results, group)),
        )
        figures = [(title, list(some)) for title, some in made]
        yield tokens_label(group["head"].iloc[0]), figures


def _continuations(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Return the cells that wrote after the prompt, by paradigm where cells are many."""
    written = [cell for cell in cells if any(cell.get(s, "samples_text") for s in STAGES)]
    paradigms = [cell.head["paradigm"] or "other" for cell in written]
    return grouped(written, paradigms if len(cells) > MANY else [""] * len(written))
