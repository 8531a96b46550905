"""The figures of what depends on a budget or on the calibration size, a line a method and model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rerail.report import drawing
from rerail.report.cells import Setting, by_model, by_paradigm, grouped_by, series_over
from rerail.report.drawing import DASHES, GRAIN, INK, LINES, MARKERS, PAPER, SOFT, Picture, panels
from rerail.report.labels import short_label, shown, varying
from rerail.report.recovery import INTERVALS, PERCENT, note_of, words_of
from rerail.report.words import number, plus_minus

AXES = {
    "ratio": "removed share of the routed experts",
    "bits": "bits of an expert's number",
    "samples": "calibration blocks",
}
METHODS = 4  # of one figure; each has a line a model


def recovery_over(column: str, settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return recovery against ratio, bits or samples; none where there is one value only."""
    methods = grouped_by(series_over(column, settings), lambda s: s[0].head["compressor"] or "?")
    return [
        _recovery(
            column, [line for lines in some for line in lines], part, f"{name}-{key}-{i}", key
        )
        for key, group in by_paradigm(list(methods.values()), lambda g: g[0][0].head).items()
        for i, (part, some) in enumerate(panels(group, METHODS))
    ]


class _Line(NamedTuple):
    """A line of a figure: what is along it, and how it looks."""

    settings: Sequence[Setting]
    label: str
    look: dict[str, Any]


def _lines(lines: Sequence[Sequence[Setting]], column: str) -> list[_Line]:
    """Name lines and give each a look: colour by method if there are several, dash by model."""
    methods = [*dict.fromkeys(line[0].head["compressor"] for line in lines)]
    fields = [n for n in varying(s for line in lines for s in line) if n != column]
    kinds = [*dict.fromkeys((line[0].head["granularity"], line[0].head["model"]) for line in lines)]
    made = []
    for i, line in enumerate(lines):
        head = line[0].head
        colour = GRAIN.get(head["granularity"], INK)
        if len(methods) > 1:
            colour = LINES[methods.index(head["compressor"]) % len(LINES)]
        dash = kinds.index((head["granularity"], head["model"])) if len(methods) > 1 else i
        look = {
            "color": colour,
            "linestyle": DASHES[dash % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        made.append(_Line(line, f"{head['model']} {short_label(head, fields)}", look))
    return made


def _recovery(
    column: str, lines: Sequence[Sequence[Setting]], part: str, name: str, paradigm: str
) -> Picture:
    figure, axes = drawing.canvas(2.6)
    methods = [*dict.fromkeys(line[0].head["compressor"] or "?" for line in lines)]
    numbers = []
    for line in _lines(lines, column):
        found = [s.estimate("repaired", "recovery") for s in line.settings]
        known = [(s.head[column], e) for s, e in zip(line.settings, found, strict=True) if e]
        axes.errorbar(
            [at for at, _ in known],
            [e.value for _, e in known],
            yerr=[e.half_interval or 0 for _, e in known],
            markersize=5,
            label=line.label,
            **line.look,
        )
        numbers += [
            [line.label, number(s.head[column]), *words_of(e), note_of(s, e)]
            for s, e in zip(line.settings, found, strict=True)
        ]
    _finish_axis(axes, column, [s.head[column] for line in lines for s in line])
    _frame(
        axes, [e.value for line in lines for s in line if (e := s.estimate("repaired", "recovery"))]
    )
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PERCENT)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    axes.set(ylabel="recovery")
    drawing.legend(figure, axes)
    said = AXES[column]
    who = methods[0] if len(methods) == 1 else ", ".join(methods)
    return Picture(
        title=f"{who}: recovery against {said}",
        caption=f"Recovered share of the lost held-out NLL{part}. {INTERVALS} Long ones are cut; "
        "the numbers have them.",
        spoken=f"Line chart of recovery against {said} for {who}. "
        + " ".join(f"{n[0]} at {n[1]}: {n[2] or n[4]}." for n in numbers),
        svg=drawing.to_svg(figure, name),
        columns=["series", column, "recovery", "95 % interval", "note"],
        numbers=numbers,
        group=paradigm,
    )


def loss_over(column: str, settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return NLL against bits, or of skippers against the experts they compute, model by model."""
    along = "skip" if column == "active_experts" else column
    return [
        _loss(column, model + part, some, f"{name}-{i}-{j}")
        for i, (model, group) in enumerate(by_model(settings).items())
        for j, (part, some) in enumerate(panels(series_over(along, group), METHODS))
    ]


def _at(setting: Setting, column: str) -> float | None:
    if column != "active_experts":
        return float(shown(setting.head, column))
    found = setting.estimate("repaired", column)
    return found.value if found else None


def _loss(column: str, model: str, lines: Sequence[Sequence[Setting]], name: str) -> Picture:
    figure, axes = drawing.canvas(2.6)
    everything = [s for line in lines for s in line]
    fields = [n for n in varying(everything) if n not in (column, "skip")]
    said = AXES.get(column, "experts computed a token and layer")
    end = drawing.within(
        [
            e.value
            for s in everything
            for e in (s.estimate(n, "nll") for n in ("compressed", "repaired"))
            if e
        ]
    )
    numbers = []
    for i, line in enumerate(lines):
        label = short_label(line[0].head, fields)
        line = sorted(line, key=lambda s: _at(s, column) or 0.0)
        for stage, dash in (("compressed", DASHES[1]), ("repaired", DASHES[0])):
            found = [s.estimate(stage, "nll") for s in line]
            known = [(_at(s, column), e.value) for s, e in zip(line, found, strict=True) if e]
            look: dict[str, Any] = {"color": LINES[i % len(LINES)], "marker": MARKERS[i]}
            look["markerfacecolor"] = PAPER if stage == "compressed" else look["color"]
            axes.plot(*zip(*known, strict=True), linestyle=dash, label=f"{label}, {stage}", **look)
        for s in line:
            stages = [s.estimate(stage, "nll") for stage in ("compressed", "repaired")]
            words = [plus_minus(e.value, e.error) if e else "" for e in stages]
            budget = short_label(s.head, ["ratio", *fields])
            numbers.append([budget, f"{_at(s, column) or 0:.4g}", *words])
    if teacher := everything[0].estimate("teacher", "nll"):
        axes.axhline(teacher.value, color=SOFT, linestyle=DASHES[2], label="teacher")
        end = max(end, teacher.value)
    if end < float("inf"):
        axes.set_ylim(top=end)
    _finish_axis(axes, column, [at for s in everything if (at := _at(s, column)) is not None])
    axes.set(xlabel=said, ylabel="held-out NLL, nats a token")
    drawing.legend(figure, axes)
    return Picture(
        title=f"{model}: NLL against {said}",
        caption="Held-out NLL; dashed: compressed, full: repaired. What lies far above is cut off; "
        "the numbers have it.",
        spoken=f"Line chart of held-out NLL against {said} for {model}. "
        + " ".join(f"{n[0]} at {n[1]}: compressed {n[2]}, repaired {n[3]}." for n in numbers),
        svg=drawing.to_svg(figure, name),
        columns=["setting", said, "compressed", "repaired"],
        numbers=numbers,
    )


def _frame(axes: Axes, values: Sequence[float]) -> None:
    """Show every value; a whisker that is many times longer than they spread is cut."""
    if values:
        low, high = min(0.0, *values), max(0.0, *values)
        room = max(0.15, 0.3 * (high - low))
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, low - room), min(top, high + room))


def _finish_axis(axes: Axes, column: str, places: Sequence[float]) -> None:
    """Name the axis of a column, with a tick at every value that was asked for."""
    axes.grid(visible=True)
    if column in AXES:
        if column == "samples":
            axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(places)))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(xlabel=AXES[column])
