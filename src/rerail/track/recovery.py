"""The figures of recovery, with 95 % intervals: fine against coarse, and what it depends on."""

import math
from collections.abc import Sequence

from matplotlib.ticker import FuncFormatter

from rerail.track import drawing
from rerail.track.cells import (
    Setting,
    choices_without,
    percent,
    series_over,
    share,
    short_label,
    varying,
)
from rerail.track.comparison import pairs_of
from rerail.track.drawing import DASHES, GRAIN, INK, MARKERS, SOFT, Bar, Picture, panels

INTERVALS = "Whiskers: 95 % intervals."
_PERCENT = FuncFormatter(lambda value, _: percent(value))


def fine_against_coarse(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return recovery of fine and coarse models, method by method; nothing without both."""
    rows: dict[str, dict[str, Setting]] = {}
    paired = [setting for pair in pairs_of(settings) for setting in pair]
    for setting in paired:
        row = rows.setdefault(choices_without(setting.head, ["model"]), {})
        row[setting.head["model"]] = setting
    fields = varying(paired)
    return [
        _against(part, group, fields, f"{name}-{i}")
        for i, (part, group) in enumerate(panels(list(rows.values()), 12))
    ]


def _against(
    part: str, rows: Sequence[dict[str, Setting]], fields: Sequence[str], name: str
) -> Picture:
    models = {m: s.head["granularity"] for row in rows for m, s in row.items()}
    figure, axes = drawing.canvas(1.15 + (0.2 + 0.26 * len(models)) * len(rows))
    width, labels, numbers, seen = 0.8 / len(models), [], [], set()
    for i, row in enumerate(rows):
        labels.append(short_label(next(iter(row.values())).head, fields))
        for model, setting in row.items():
            place = i + (list(models).index(model) - (len(models) - 1) / 2) * width
            label = "" if model in seen else f"{model} ({models[model]})"
            drawing.bar(axes, _bar(place, width, setting), GRAIN[models[model]], label)
            seen.add(model)
            numbers.append([labels[i], model, *_recovery(setting)])
    drawing.row_labels(axes, labels)
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.margins(x=0.2)
    axes.set(xlabel="recovered share of the lost NLL")
    drawing.legend(figure, axes)
    return Picture(
        title=f"Recovery, fine against coarse{part}",
        caption="Share of the lost held-out NLL that the repair brought back, for settings that "
        f"both models have. {INTERVALS} Those of several seeds hold for their mean.",
        spoken="Bar chart of recovery. "
        + " ".join(f"{n[0]} on {n[1]}: {n[2] or n[4]}." for n in numbers),
        svg=drawing.to_svg(figure, name),
        columns=["setting", "model", "recovery", "95 % interval", "note"],
        numbers=numbers,
    )


def recovery_over(column: str, settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return a panel a method: recovery against a column; none where it has one value only."""
    methods: dict[str, list[list[Setting]]] = {}
    for series in series_over(column, settings):
        methods.setdefault(series[0].head["compressor"] or "?", []).append(series)
    return [
        _over(column, method, group, f"{name}-{i}")
        for i, (method, group) in enumerate(methods.items())
    ]


def _over(column: str, method: str, lines: Sequence[Sequence[Setting]], name: str) -> Picture:
    figure, axes = drawing.canvas(2.6 + 0.2 * math.ceil(len(lines) / 2))
    fields = [n for n in varying(s for line in lines for s in line) if n != column]
    numbers = []
    for i, line in enumerate(lines):
        label = short_label(line[0].head, fields, first="model")
        found = [s.estimate("repaired", "recovery") for s in line]
        known = [(s.head[column], e) for s, e in zip(line, found, strict=True) if e]
        axes.errorbar(
            [at for at, _ in known],
            [e.value for _, e in known],
            yerr=[e.half_interval or 0 for _, e in known],
            color=GRAIN.get(line[0].head["granularity"], INK),
            linestyle=DASHES[i % len(DASHES)],
            marker=MARKERS[i % len(MARKERS)],
            label=label,
        )
        numbers += [[label, f"{s.head[column]:g}", *_recovery(s)] for s in line]
    said = {"ratio": "removed share of the routed experts", "samples": "calibration blocks"}[column]
    if column == "samples":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    axes.grid(visible=True)
    axes.set(xlabel=said, ylabel="recovery")
    drawing.legend(figure, axes)
    return Picture(
        title=f"{method}: recovery against {said}",
        caption=f"Recovered share of the lost held-out NLL. {INTERVALS}",
        spoken=f"Line chart of recovery against {said} for {method}. "
        + " ".join(f"{n[0]} at {n[1]}: {n[2] or n[4]}." for n in numbers),
        svg=drawing.to_svg(figure, name),
        columns=["series", column, "recovery", "95 % interval", "note"],
        numbers=numbers,
    )


def _bar(place: float, width: float, setting: Setting) -> Bar:
    found = setting.estimate("repaired", "recovery")
    if not found:
        return Bar(place, width * 0.92, 0.0, None, setting.no_recovery)
    return Bar(place, width * 0.92, found.value, found.half_interval, percent(found.value))


def _recovery(setting: Setting) -> list[str]:
    """Return recovery, its interval, and a note: the number of seeds or why it is blank."""
    found = setting.estimate("repaired", "recovery")
    if not found:
        return ["", "", setting.no_recovery]
    half = found.half_interval
    interval = (
        "" if half is None else f"{percent(found.value - half)} to {percent(found.value + half)}"
    )
    seeds = f"{found.n} of {len(setting.cells)} seeds" if len(setting.cells) > 1 else "one seed"
    return [share(found.value, found.error), interval, seeds]
