"""Matplotlib figures as inline SVG that follows the page: its font, its light and dark colours."""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Each stands for a colour of the page; no figure uses these colours for themselves.
INK, SOFT, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
_SERIES = [f"#0505{i:02x}" for i in range(8)]
TEACHER, COMPRESSED, REPAIRED, FINE, COARSE = _SERIES[:5]
_PAGE = {INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper"} | {
    colour: f"s{i}" for i, colour in enumerate(_SERIES)
}
STAGE = {"teacher": TEACHER, "compressed": COMPRESSED, "repaired": REPAIRED}
LINES = _SERIES[1:]
GRAIN = {"fine": FINE, "coarse": COARSE}
MARKERS = "osD^vPX*<>"
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rerail",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "errorbar.capsize": 3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
        title: its heading.
        caption: what is shown, with which errors.
        spoken: what a screen reader says instead of the drawing.
        svg: the drawing, an `<svg>` element without ids that another picture has.
        columns: names of the columns of the numbers.
        numbers: the rows behind the drawing, as text.
    """

    title: str
    caption: str
    spoken: str
    svg: str
    columns: Sequence[str]
    numbers: Sequence[Sequence[str]] = field(default_factory=list)


class Bar(NamedTuple):
    """A horizontal bar: place and width on the y axis, length, whisker and printed number."""

    place: float
    width: float
    length: float
    error: float | None
    text: str


def brief(label: str, at_most: int = 30) -> str:
    """Return a label that leaves room for the drawing; the table of numbers has the whole one."""
    return label if len(label) <= at_most else f"{label[: at_most - 1]}…"


def panels(items: Sequence[Any], at_most: int) -> list[tuple[str, Sequence[Any]]]:
    """Return items in parts of at most this many, each with what its title adds."""
    parts = [items[i : i + at_most] for i in range(0, len(items), at_most)]
    if len(parts) < 2:
        return [("", part) for part in parts]
    return [(f" ({i} of {len(parts)})", part) for i, part in enumerate(parts, 1)]


def canvas(height: float, width: float = 4.6) -> tuple[Figure, Axes]:
    """Return an empty figure of this size in inches and its axes; call inside `style()`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def style() -> AbstractContextManager[None]:
    """Return the context in which figures are drawn and turned into SVG."""
    return mpl.rc_context(_STYLE)


def bar(axes: Axes, one: Bar, colour: str, label: str = "") -> None:
    """Draw a bar with its whisker and its number behind both."""
    axes.barh(one.place, one.length, one.width, color=colour, label=label or "_")
    if one.error is not None:
        whisker: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": "none"}
        axes.errorbar(one.length, one.place, xerr=one.error, **whisker)
    end = (max(0.0, one.length + (one.error or 0.0)), one.place)
    how: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
    axes.annotate(one.text, end, (4, 0), **how)


def row_labels(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows of a bar chart, the first on top."""
    axes.set_yticks(range(len(labels)), map(brief, labels))
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(visible=True, axis="x")
    axes.tick_params(axis="y", length=0)


def legend(figure: Figure, axes: Axes) -> None:
    """Put the legend under the axes, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        labels = [brief(label) for label in labels]
        wide = max(map(len, labels))
        columns = 3 if wide < 18 else 2 if wide < 28 else 1
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=2.4)


def to_svg(figure: Figure, name: str) -> str:
    """Return the figure as `<svg>` for inlining; `name` keeps its ids apart from other figures'."""
    with io.StringIO() as out:
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        text = out.getvalue()
    text = text[text.index(">", text.index("<svg")) + 1 :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    text = re.sub(r'\sid="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    text = text.replace("'DejaVu Sans'", "inherit").replace("DejaVu Sans", "inherit")
    for colour, variable in _PAGE.items():
        text = text.replace(colour, f"var(--{variable})")
    width, height = (72 * inches for inches in figure.get_size_inches())
    limits = f"min-width:{width * 0.9:.0f}px;max-width:{width * 1.75:.0f}px"
    return f'<svg viewBox="0 0 {width:g} {height:g}" style="{limits}">{text}'
