"""One self-contained page of all results: no network, no account, readable from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rerail.config.secrets import without_secrets
from rerail.errors import InputError
from rerail.files import whole_file
from rerail.report import charts, paper, routing_charts, tables
from rerail.report.cells import Cell, Fields
from rerail.report.comparison import comparison
from rerail.report.frame import MANY, Results, varying
from rerail.report.page import Continuation, Folded, Section, Words, figures, page
from rerail.run.results import SCALARS, STAGES
from rerail.run.settings import tokens_label


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
    settings, done = results.settings, results.done
    routing = [*routing_charts.heat_maps(settings), *routing_charts.load_maps(settings)]
    training = routing_charts.training_curves(settings)
    seeds = [*tables.means(results), *figures(charts.forest(results, settings))]
    sections = [
        tables.problems(problems),
        tables.overview(results.cells, columns),
        tables.unfinished(results.cells),
        quality(results),
        Section("seeds", "Seeds and differences", [*seeds, *tables.differences(results)]),
        tables.sizes(done),
        tables.by_text(done),
        tables.benchmarks(done),
        paper.beside(done),
        Section("routers", "Routers, layer by layer", figures(routing)),
        Section("training", "Training", figures(training)),
        continuations(done),
        tables.reproduce(results.cells),
    ]
    return str(without_secrets(page(title, _lead(results), sections)))


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


def quality(results: Results) -> Section:
    """Return the figures of quality, apart for every set of held-out tokens."""
    groups = [part for _, part in results.settings.groupby("tokens", sort=False)]
    parts: list[Any] = []
    if len(groups) > 1:
        warning = f"The cells were measured on {len(groups)} different sets of held-out tokens. "
        warning += (
            "Numbers of different tokens cannot be compared: each set has figures of its own."
        )
        parts.append(Words("p", warning, "warning"))
    if any(map(varying, groups)):
        legend = "In the labels of the figures r is the ratio and n the number of samples."
        parts.append(Words("p", legend, "soft"))
    for i, group in enumerate(groups, 1):
        name = f"Set {i}: " if len(groups) > 1 else "On "
        parts.append(Words("h3", name + tokens_label(group["head"].iloc[0])))
        for title, made in (
            ("", charts.pareto(results, group)),
            ("Recovery, fine against coarse", charts.fine_against_coarse(results, group)),
            ("Before and after the repair", charts.before_after(results, group)),
            ("Against the removed share", charts.recovery_over("ratio", results, group)),
            ("Against bits", charts.loss_over("bits", results, group)),
            ("", charts.recovery_over("bits", results, group)),
            ("Against skipped experts", charts.loss_over("active_experts", results, group)),
            ("Against the calibration size", charts.recovery_over("samples", results, group)),
            ("By calibration text", charts.by_calibration(results, group)),
        ):
            if pictures := figures(made):
                parts += [*([Words("h4", title)] if title else []), *pictures]
    return Section("quality", "Quality", parts)


def continuations(cells: Sequence[Cell]) -> Section:
    """Return what the models wrote after the prompt, side by side; each prompt and cell apart."""
    groups: dict[str, list[Continuation]] = {}
    for cell in cells:
        texts = [(stage, cell.get(stage, "samples_text")) for stage in STAGES]
        if texts := [(stage, text) for stage, text in texts if text]:
            group = (cell.head["paradigm"] or "other") if len(cells) > MANY else ""
            article = Continuation(cell.full_name, cell.head["prompt"] or "", texts)
            groups.setdefault(group, []).append(article)
    parts: list[Any] = []
    for group, articles in groups.items():
        parts += [Folded(f"{group} ({len(articles)} cells)", articles)] if group else articles
    return Section("continuations", "The same prompt continued", parts)
