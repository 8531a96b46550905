"""Matplotlib figures as inline SVG that follows the page: its font, its light and dark colours."""

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

Grid = NDArray[np.float64]

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

_STYLE = mpl.rc_params_from_file(
    Path(__file__).with_name("page.mplstyle"), use_default_template=False
)


def brief(label: str, at_most: int = 34) -> str:
    """Return a label that leaves room for the drawing; the table of numbers has the whole one."""
    return label if len(label) <= at_most else f"{label[: at_most - 1]}…"


def within(values: Any) -> float:
    """Return the end of an axis that shows all values, or all but those that are far off.

    Far off is more than four times as far from the smallest as three quarters of them are.
    """
    low, most, high = np.nanquantile(values, [0, 0.75, 1])
    return float(low + 2 * (most - low)) if high - low > 4 * (most - low) > 0 else math.inf


def canvas(height: float, width: float = 4.6) -> tuple[Figure, Axes]:
    """Return an empty figure of this size in inches and its axes; call inside `style()`."""
    figure = Figure(figsize=(width, height), dpi=72)
    axes = figure.add_subplot()
    margins(axes, left=0.72, right=0.25, top=0.12, bottom=0.5)
    return figure, axes


def margins(axes: Axes, **inches: float) -> None:
    """Set the room beside the axes; a layout that measures would take as long as the drawing.

    The page has a font of its own, so what is measured here is an estimate anyway.
    """
    figure: Any = axes.figure
    width, height = figure.get_size_inches()
    sizes = {"left": width, "right": width, "bottom": height, "top": height}
    shares = {side: room / sizes[side] for side, room in inches.items()}
    far = ("right", "top")
    figure.subplots_adjust(**{n: 1 - share if n in far else share for n, share in shares.items()})


def style() -> AbstractContextManager[None]:
    """Return the context in which figures are drawn and turned into SVG."""
    return mpl.rc_context(_STYLE)


def colours(axes: Axes, grid: Grid, most: float, *, image: bool) -> None:
    """Draw a grid (rows, columns) of 0 to `most` as colours; what is missing is left empty.

    As an image where there are thousands of fields; else with their numbers where there is room.
    """
    rows, columns = grid.shape
    look: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": most}
    if image:
        place = (0, columns, rows, 0)
        look |= {"interpolation": "none", "aspect": "auto", "extent": place}
        axes.imshow(np.ma.masked_invalid(grid), **look)
    else:
        look |= {"edgecolor": "face", "linewidth": 0.3}  # no seams
        axes.pcolormesh(np.ma.masked_invalid(grid), **look)
        axes.invert_yaxis()
    for (row, column), value in np.ndenumerate(grid):
        if not image and columns <= 13 and rows <= 12 and not np.isnan(value):
            ink = "#000000" if value > 0.45 * most else "#ffffff"
            how: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5, "color": ink}
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}", **how)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def name_rows(axes: Axes, places: Sequence[float], labels: Sequence[str]) -> None:
    """Write labels to the left of the axes, with room for them."""
    words = [brief(label) for label in labels]
    axes.set_yticks(places, words)
    margins(axes, left=0.2 + 0.078 * max(map(len, words)))


def legend(figure: Figure, axes: Axes) -> None:
    """Put the legend under the axes, and make the figure so much taller."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        labels = [brief(label) for label in labels]
        wide = max(map(len, labels))
        columns = 3 if wide <= 13 else 2 if wide <= 24 else 1
        room = 0.1 + 0.2 * math.ceil(len(labels) / columns)
        width, height = figure.get_size_inches()
        top = (1 - figure.subplotpars.top) * height
        figure.set_size_inches(width, height + room)
        margins(axes, top=top, bottom=0.5 + room)
        figure.legend(handles, labels, loc="lower left", ncols=columns, handlelength=2.4)


def to_svg(figure: Figure, name: str) -> str:
    """Return the figure as `<svg>` for inlining; `name` keeps its ids apart from other figures'."""
    with io.StringIO() as out:
        # what savefig does, but for a first drawing that is thrown away
        writer: Any = FigureCanvasSVG(figure)
        writer.print_svg(out, metadata={"Date": None, "Creator": None})
        text = out.getvalue()
    text = text[text.index(">", text.index("<svg")) + 1 :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    # ids that nothing refers to go; the others get the name before them
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    text = re.sub(r'\sid="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    # font and colours are those of the page
    text = text.replace("'DejaVu Sans'", "inherit").replace("DejaVu Sans", "inherit")
    for colour, variable in _PAGE.items():
        text = text.replace(colour, f"var(--{variable})")
    width, height = (72 * inches for inches in figure.get_size_inches())
    limits = f"min-width:{width * 0.9:.0f}px;max-width:{width * 1.75:.0f}px"
    return f'<svg viewBox="0 0 {width:g} {height:g}" style="{limits}">{text}'
