"""Charts as data and encoding, drawn by one helper: axes, legend, number formats, whiskers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rerail.report import svg
from rerail.report.svg import DASHES, INK, SOFT, STAGE
from rerail.report.words import percent

PLAIN: dict[str, Any] = {"color": INK, "marker": "o", "linestyle": "none"}
ROW: Any = {"va": "center", "textcoords": "offset points", "fontsize": 8.5}


@dataclass(frozen=True)
class Marks:
    """One series of a chart.

    Attributes:
        data: a row a mark; columns x and y, and where they apply error (half of the whisker's
            length) and words (printed behind the mark).
        label: in the legend; empty for none.
        style: looks of points and of the line through them, over `PLAIN`, as matplotlib has them.
        bars: height of bars from zero, instead of points.
        steps: whether the line goes in steps.
        offset: from a mark to its words, in points.
    """

    data: pd.DataFrame
    label: str = ""
    style: dict[str, Any] = field(default_factory=dict)
    bars: float = 0.0
    steps: bool = False
    offset: tuple[float, float] = (7, 0)

    @property
    def lined(self) -> bool:
        """Whether a line goes through the points."""
        return "linestyle" in self.style


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        label: what it measures, with the unit.
        rows: labels of rows at 0, 1, ... from the top, for an axis that measures nothing.
        ticks: the places of ticks; chosen by the drawing where there are none.
        log2: logarithmic.
        shares: numbers in percent.
        start: where it begins.
        end: what lies beyond is drawn as a triangle here, a line is cut.
        cut: whether long whiskers are cut, so that the values fill the axis.
        margin: free share at both ends.
    """

    label: str = ""
    rows: Sequence[str] = ()
    ticks: Sequence[float] = ()
    log2: bool = False
    shares: bool = False
    start: float | None = None
    end: float = math.inf
    cut: bool = False
    margin: float = 0.05


@dataclass(frozen=True)
class Plot:
    """Marks on two axes; whiskers belong to the measured one, x where y has rows.

    Attributes:
        height: of the drawing, or of each row where y has rows, in inches.
        teacher: a line at this value of the measured axis; NaN for none.
    """

    marks: Sequence[Marks]
    x: Axis
    y: Axis
    height: float = 2.6
    teacher: float = math.nan

    @property
    def measured(self) -> str:
        """The name of the axis that measures."""
        return "x" if self.y.rows else "y"

    def draw(self) -> Figure:
        """Return the drawing; call inside `svg.style()`."""
        rows = len(self.y.rows)
        figure, axes = svg.canvas(0.75 + self.height * rows if rows else self.height)
        for marks in self.marks:
            if marks.bars:
                _draw_bars(axes, marks)
            else:
                _draw_points(axes, marks, self)
        across = axes.axvline if rows else axes.axhline
        if getattr(self, self.measured).shares:
            across(0, color=SOFT, linewidth=0.8)
        if not math.isnan(self.teacher):
            across(self.teacher, label="teacher", color=STAGE["teacher"], linestyle=DASHES[1])
        for name in ("x", "y"):
            _finish(axes, name, self)
        _write_words(axes, self)
        svg.legend(figure, axes)
        return figure


def _draw_bars(axes: Axes, marks: Marks) -> None:
    data = marks.data
    axes.barh(data["y"], data["x"], marks.bars, color=marks.style["color"], label=marks.label)
    errors = data["error"].fillna(0)
    if errors.any():
        whisker: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": "none"}
        axes.errorbar(data["x"], data["y"], xerr=errors, **whisker)


def _draw_points(axes: Axes, marks: Marks, plot: Plot) -> None:
    # points beyond the end become triangles on it; a line leaves the drawing there
    look = PLAIN | marks.style
    end = math.inf if marks.lined else getattr(plot, plot.measured).end
    beyond = marks.data[plot.measured] > end
    near, far = marks.data[~beyond], marks.data[beyond]
    named: dict[str, Any] = {"label": marks.label or "_", **look}
    if marks.steps:
        axes.step(near["x"], near["y"], where="post", linewidth=1, **named)
    elif "error" in near:
        errors = near["error"].fillna(0)
        whiskers: dict[str, Any] = {f"{plot.measured}err": errors if errors.any() else None}
        thin: dict[str, Any] = {"capsize": 2 + marks.lined, "elinewidth": 1.2}
        axes.errorbar(near["x"], near["y"], **whiskers, **thin, **named)
    else:
        axes.plot(near["x"], near["y"], **named)
    triangle = {"x": ">", "y": "^"}[plot.measured]
    places = far.assign(**{plot.measured: end})
    axes.plot(places["x"], places["y"], **look | {"marker": triangle, "linestyle": "none"})


def _finish(axes: Axes, name: str, plot: Plot) -> None:
    """Name an axis, set its ticks, its numbers and where it begins and ends."""
    axis: Axis = getattr(plot, name)
    if axis.rows:
        svg.name_rows(axes, range(len(axis.rows)), axis.rows)
        axes.set_ylim(len(axis.rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        return
    axes.margins(**{name: axis.margin})  # type: ignore[arg-type]
    axes.set(**{f"{name}label": axis.label})
    axes.grid(visible=True, axis="x" if plot.y.rows else "both")
    if axis.log2:
        getattr(axes, f"set_{name}scale")("log", base=2)
    _set_ticks(axes, getattr(axes, f"{name}axis"), axis)
    limits = getattr(axes, f"set_{name}lim")
    if axis.cut:
        limits(*_cut(plot, *getattr(axes, f"get_{name}lim")()))
    if axis.start is not None:
        limits(axis.start, None)
    if axis.end < math.inf and any(marks.lined and not marks.steps for marks in plot.marks):
        limits(None, axis.end)


def _set_ticks(axes: Axes, side: Any, axis: Axis) -> None:
    if axis.ticks:
        side.set_ticks(sorted(set(axis.ticks)))
        axes.minorticks_off()
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif axis.shares:
        side.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        side.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))


def _cut(plot: Plot, low: float, high: float) -> tuple[float, float]:
    """Return limits that show every value; whiskers that are longer than they spread are cut."""
    values = pd.concat([marks.data[plot.measured] for marks in plot.marks]).dropna()
    least, most = min([0.0, *values]), max([0.0, *values])
    room = max(0.15, 0.3 * (most - least))
    return max(low, least - room), min(high, most + room)


def _write_words(axes: Axes, plot: Plot) -> None:
    """Print the words behind their marks, and widen the x axis so that they stay inside."""
    figure: Any = axes.figure
    # the width of a letter is an estimate: the page has a font of its own
    low, high = axes.get_xlim()
    width = figure.get_size_inches()[0] * (figure.subplotpars.right - figure.subplotpars.left)
    for marks in plot.marks:
        for mark in marks.data.to_dict("records") if "words" in marks.data else ():
            end = mark["x"]
            if marks.bars:
                end = max(0.0, end + (0.0 if pd.isna(mark["error"]) else mark["error"]))
            axes.annotate(mark["words"], (end, mark["y"]), marks.offset, **ROW)
            free = 1 - (0.08 + 0.075 * len(mark["words"])) / width
            high = max(high, low + (end - low) / max(free, 0.1))
    if plot.y.rows:
        axes.set_xlim(low, high)


@dataclass(frozen=True)
class HeatMap:
    """Rows of numbers as colours, in blocks side by side.

    Attributes:
        values: a row a row of the drawing, a column a place; columns are (block, place), and a
            missing number is left empty.
        labels: (row, label) of the names to the left.
        most: what has the last colour; what is more has it, too.
        label: of the x axis.
        height, width: in inches.
        image: draw an image, for grids of thousands; its places are not named.
    """

    values: pd.DataFrame
    labels: Sequence[tuple[float, str]]
    label: str
    height: float
    width: float = 4.6
    most: float = 1.0
    image: bool = False

    def draw(self) -> Figure:
        """Return the drawing; call inside `svg.style()`."""
        blocks = list(dict.fromkeys(self.values.columns.get_level_values(0)))
        places = sorted(set(self.values.columns.get_level_values(1)))
        gap = max(1, len(places) // 16) if self.image else 1
        step = len(places) + gap
        grid = np.full((len(self.values), step * len(blocks) - gap), np.nan)
        for i, block in enumerate(blocks):
            part = self.values[block].reindex(columns=places).to_numpy(float)
            grid[:, i * step : i * step + len(places)] = part
        figure, axes = svg.canvas(self.height, self.width)
        svg.colours(axes, grid, self.most, image=self.image)
        named = [] if self.image else range(0, len(places), max(1, len(places) // 6))
        ticks = [i * step + j + 0.5 for i in range(len(blocks)) for j in named]
        axes.set_xticks(ticks, [str(places[j]) for j in named] * len(blocks))
        for i, block in enumerate(blocks):
            above: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 9}
            middle = i * step + len(places) / 2
            axes.annotate(block, (middle, 0), (0, 3), textcoords="offset points", **above)
        axes.set_xlabel(self.label)
        svg.name_rows(axes, [at for at, _ in self.labels], [word for _, word in self.labels])
        svg.margins(axes, top=0.35)
        return figure


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Attributes:
        title: its heading.
        caption: what is shown, with which errors.
        opening: how a screen reader begins; `sentence` of each row of the numbers follows.
        numbers: the columns behind the drawing, as text.
        sentence: a row of the numbers in words, a format of its fields by place; `value` is the
            first after the two names that is not blank.
        drawing: what is drawn.
        most_spoken: rows of the numbers that are read out at most.
        group: what it is folded under; empty where it is always open.
    """

    title: str
    caption: str
    opening: str
    numbers: Mapping[str, Sequence[str]]
    sentence: str
    drawing: Plot | HeatMap
    group: str = ""
    most_spoken: int = 1000

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The numbers, row by row."""
        return list(zip(*self.numbers.values(), strict=True))

    @property
    def spoken(self) -> str:
        """What a screen reader says instead of the drawing."""
        rows = self.rows[: self.most_spoken] if self.sentence else ()
        sentences = [self.sentence.format(*n, value=next(filter(None, n[2:]), "")) for n in rows]
        return " ".join([self.opening, *sentences])

    def svg(self, name: str) -> str:
        """Return the drawing; `name` keeps its ids apart from those of other drawings."""
        with svg.style():
            return svg.to_svg(self.drawing.draw(), name)
