"""The figures of quality: before and after the repair, and against size.

Whiskers are one standard error of the row itself, or one standard deviation over seeds where there
are several.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from rerail.report import drawing
from rerail.report.cells import MANY, STAGES, Estimate, Setting, by_model
from rerail.report.drawing import DASHES, INK, MARKERS, PAPER, SOFT, STAGE, Picture
from rerail.report.labels import short_label, varying
from rerail.report.panels import Panel, panels_of
from rerail.report.words import plus_minus

ERRORS = "Whiskers: one standard error, or one standard deviation over seeds where n > 1."
FAR = "A triangle at the edge stands for a value beyond it; the numbers have it."
SHIFT = {"compressed": -0.14, "repaired": 0.14}


def before_after(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return a panel a model: NLL before and after as points, of the teacher as a line."""
    fields = varying(settings)
    return [
        _before_after(panel, fields, f"{name}-{i}")
        for i, panel in enumerate(panels_of(settings, 20))
    ]


def _before_after(panel: Panel, fields: Sequence[str], name: str) -> Picture:
    settings = panel.settings
    figure, axes = drawing.canvas(0.75 + 0.27 * len(settings))
    labels = [short_label(s.head, fields) for s in settings]
    found = [{stage: s.estimate(stage, "nll") for stage in STAGES} for s in settings]
    end = drawing.within([e.value for held in found for e in held.values() if e])
    for stage, shift in SHIFT.items():
        held = [(i + shift, one[stage]) for i, one in enumerate(found) if one[stage]]
        _points(axes, held, end, stage)
    words = [" → ".join(f"{e.value:.3f}" for n in SHIFT if (e := one[n])) for one in found]
    reach = [
        max((e.value + (e.error or 0) for e in one.values() if e), default=0.0) for one in found
    ]
    reach = [min(one, end) for one in reach]
    for i, (place, said) in enumerate(zip(reach, words, strict=True)):
        how: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
        axes.annotate(said, (place, i), (7, 0), **how)
    if teacher := settings[0].estimate("teacher", "nll"):
        axes.axvline(teacher.value, color=STAGE["teacher"], linestyle=DASHES[1], label="teacher")
    drawing.row_labels(axes, labels)
    axes.margins(x=0.06)
    drawing.room_for_words(axes, reach, words)
    axes.set(xlabel="held-out NLL, nats a token")
    drawing.legend(figure, axes)
    numbers = [
        [label, *(_number(one[stage]) for stage in STAGES), _seeds(one)]
        for label, one in zip(labels, found, strict=True)
    ]
    return Picture(
        title=f"{panel.title}: before and after the repair",
        caption="Held-out NLL; lower is better, the dashed line is the teacher. "
        + ("" if end == np.inf else f"{FAR} ")
        + ERRORS,
        spoken=f"Chart of held-out NLL for {panel.title}. "
        + " ".join(f"{n[0]}: teacher {n[1]}, compressed {n[2]}, repaired {n[3]}." for n in numbers),
        svg=drawing.to_svg(figure, name),
        columns=["setting", *STAGES, "seeds"],
        numbers=numbers,
        group=panel.paradigm,
    )


def _points(axes: Axes, held: Sequence[tuple[float, Any]], end: float, stage: str) -> None:
    """Draw the points of a stage with their whiskers; those beyond the end as triangles there."""
    near = [(place, e) for place, e in held if e.value <= end]
    look: dict[str, Any] = {"color": STAGE[stage], "linestyle": "none", "markersize": 5.5}
    look["markerfacecolor"] = PAPER if stage == "compressed" else STAGE[stage]
    whiskers = [e.error or 0.0 for _, e in near]
    axes.errorbar(
        [e.value for _, e in near],
        [place for place, _ in near],
        xerr=whiskers if any(whiskers) else None,
        marker="o",
        label=stage,
        capsize=2,
        elinewidth=1,
        **look,
    )
    far = [place for place, e in held if e.value > end]
    axes.plot([end] * len(far), far, ">", **look)


class _Point(NamedTuple):
    """A model in the plane of size (MB) and NLL."""

    size: float
    nll: Estimate
    stage: str
    kind: str
    said: str


def pareto(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return a panel a model: NLL against bytes, with the front of what no other point beats."""
    return [
        _pareto(model, group, varying(settings), f"{name}-{i}")
        for i, (model, group) in enumerate(by_model(settings).items())
    ]


def _of_plane(settings: Sequence[Setting], fields: Sequence[str]) -> list[_Point]:
    kind = "compressor" if len({s.head["compressor"] for s in settings}) <= 6 else "paradigm"
    points = []
    for i, setting in enumerate(settings):
        for stage in STAGES[1:] if i else STAGES:
            size, nll = setting.estimate(stage, "bytes"), setting.estimate(stage, "nll")
            if size and nll:
                said = f"{short_label(setting.head, fields)}, {stage}"
                said = stage if stage == "teacher" else said
                points.append(_Point(size.value / 1e6, nll, stage, setting.head[kind] or "?", said))
    return points


def _pareto(model: str, settings: Sequence[Setting], fields: Sequence[str], name: str) -> Picture:
    figure, axes = drawing.canvas(3.2)
    points = _of_plane(settings, fields)
    end = drawing.within([p.nll.value for p in points]) if points else np.inf
    kinds = sorted({p.kind for p in points if p.stage != "teacher"})
    for stage in STAGES:
        for kind in kinds:
            some = [p for p in points if (p.stage, p.kind) == (stage, kind)]
            marker = "*" if stage == "teacher" else MARKERS[kinds.index(kind) % len(MARKERS)]
            _scatter(axes, some, stage, marker, end, whiskers=len(settings) <= MANY)
    front = _front(points)
    line = np.array([(p.size, min(p.nll.value, end)) for p in front]).reshape(-1, 2)
    axes.step(*line.T, where="post", color=SOFT, linewidth=1, linestyle=DASHES[2])
    for i, (x, y) in enumerate(line, 1):
        axes.annotate(str(i), (x, y), (-8, -9), textcoords="offset points", fontsize=8)
    for i, kind in enumerate(kinds):
        axes.plot([], [], MARKERS[i % len(MARKERS)], color=INK, markerfacecolor="none", label=kind)
    for stage in STAGES:
        axes.plot([], [], "*" if stage == "teacher" else "s", color=STAGE[stage], label=stage)
    axes.grid(visible=True)
    axes.margins(0.12)
    axes.set(xlabel="whole model, MB", ylabel="held-out NLL, nats a token")
    drawing.legend(figure, axes)
    best = "; ".join(f"{i} {p.said}" for i, p in enumerate(front, 1))
    return Picture(
        title=f"{model}: quality against size",
        caption="Held-out NLL against the size of the whole model; lower left is better. Hollow: "
        f"compressed, filled: repaired. The dotted front joins what no other point beats: {best}. "
        + ("" if end == np.inf else f"{FAR} ")
        + (ERRORS if len(settings) <= MANY else "The errors are in the numbers."),
        spoken=f"Scatter plot of held-out NLL against megabytes for {model}. The front: {best}. "
        + " ".join(f"{p.said}: {p.size:,.2f} MB, NLL {_number(p.nll)}." for p in points[:40]),
        svg=drawing.to_svg(figure, name),
        columns=["model", "size", "NLL"],
        numbers=[[p.said, f"{p.size:,.2f} MB", _number(p.nll)] for p in points],
    )


def _scatter(
    axes: Axes, points: Sequence[_Point], stage: str, marker: str, end: float, *, whiskers: bool
) -> None:
    near, far = ([p for p in points if (p.nll.value > end) == beyond] for beyond in (False, True))
    look: dict[str, Any] = {"color": STAGE[stage], "linestyle": "none"}
    look["markersize"] = 11 if stage == "teacher" else 6.5
    look["markerfacecolor"] = PAPER if stage == "compressed" else STAGE[stage]
    errors = [p.nll.error or 0.0 for p in near]
    axes.errorbar(
        [p.size for p in near],
        [p.nll.value for p in near],
        yerr=errors if whiskers and any(errors) else None,
        marker=marker,
        **look,
    )
    axes.plot([p.size for p in far], [end] * len(far), "^", **look)


def _front(points: Sequence[_Point]) -> list[_Point]:
    """Return the points that no other one beats in size and NLL, by size."""
    front: list[_Point] = []
    for point in sorted(points, key=lambda p: (p.size, p.nll.value)):
        if not front or point.nll.value < front[-1].nll.value:
            front.append(point)
    return front


def _number(found: Estimate | None) -> str:
    return plus_minus(found.value, found.error) if found else ""


def _seeds(found: dict[str, Estimate | None]) -> str:
    return str(max(e.n for e in found.values() if e))
