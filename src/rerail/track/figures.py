"""The figures of quality: before and after the repair, and against size.

Whiskers are one standard error of the row itself, or one standard deviation over seeds where there
are several.
"""

from collections.abc import Sequence

import numpy as np

from rerail.track import drawing
from rerail.track.cells import (
    STAGES,
    Estimate,
    Setting,
    by_model,
    plus_minus,
    short_label,
    varying,
)
from rerail.track.drawing import DASHES, INK, MARKERS, PAPER, SOFT, STAGE, Bar, Picture, panels

ERRORS = "Whiskers: one standard error, or one standard deviation over seeds where n > 1."


def before_after(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return a panel a model: NLL of compressed and repaired as bars, of the teacher as a line."""
    return [
        _before_after(model + part, group, varying(settings), f"{name}-{i}-{j}")
        for i, (model, whole) in enumerate(by_model(settings).items())
        for j, (part, group) in enumerate(panels(whole, 12))
    ]


def _before_after(
    model: str, settings: Sequence[Setting], fields: Sequence[str], name: str
) -> Picture:
    figure, axes = drawing.canvas(1.15 + 0.52 * len(settings))
    labels = [short_label(s.head, fields) for s in settings]
    numbers = []
    for i, setting in enumerate(settings):
        found = {stage: setting.estimate(stage, "nll") for stage in STAGES}
        for stage, shift in (("compressed", -0.19), ("repaired", 0.19)):
            if one := found[stage]:
                label = stage if i == 0 else ""
                bar = Bar(i + shift, 0.34, one.value, one.error, f"{one.value:.3f}")
                drawing.bar(axes, bar, STAGE[stage], label)
        numbers.append([labels[i], *(_number(found[stage]) for stage in STAGES), _seeds(found)])
    teacher = settings[0].estimate("teacher", "nll")
    if teacher:
        axes.axvline(teacher.value, color=STAGE["teacher"], linestyle=DASHES[1], label="teacher")
    drawing.row_labels(axes, labels)
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.set(xlabel="held-out NLL, nats a token")
    drawing.legend(figure, axes)
    return Picture(
        title=f"{model}: before and after the repair",
        caption=f"Held-out NLL; lower is better, the dashed line is the teacher. {ERRORS}",
        spoken=f"Bar chart of held-out NLL for {model}. "
        + " ".join(f"{n[0]}: teacher {n[1]}, compressed {n[2]}, repaired {n[3]}." for n in numbers),
        svg=drawing.to_svg(figure, name),
        columns=["setting", *STAGES, "seeds"],
        numbers=numbers,
    )


def pareto(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return a panel a model: NLL against bytes, with the front of what no other point beats."""
    return [
        _pareto(model, group, varying(settings), f"{name}-{i}")
        for i, (model, group) in enumerate(by_model(settings).items())
    ]


def _pareto(model: str, settings: Sequence[Setting], fields: Sequence[str], name: str) -> Picture:
    figure, axes = drawing.canvas(3.3)
    points, numbers = [], []
    methods = sorted({s.head["compressor"] or "?" for s in settings})
    for i, setting in enumerate(settings):
        marker = MARKERS[methods.index(setting.head["compressor"] or "?") % len(MARKERS)]
        for stage in STAGES[1:] if i else STAGES:
            size, nll = setting.estimate(stage, "bytes"), setting.estimate(stage, "nll")
            if size is None or nll is None:
                continue
            points.append((size.value / 1e6, nll.value))
            axes.errorbar(
                *points[-1],
                yerr=nll.error,
                marker="*" if stage == "teacher" else marker,
                markersize=11 if stage == "teacher" else 7,
                color=STAGE[stage],
                markerfacecolor=PAPER if stage == "compressed" else STAGE[stage],
                linestyle="none",
            )
            said = stage if stage == "teacher" else f"{short_label(setting.head, fields)}, {stage}"
            numbers.append([said, f"{size.value / 1e6:,.2f} MB", _number(nll)])
    front = np.array(_front(points)).reshape(-1, 2)
    axes.step(*front.T, where="post", color=SOFT, linewidth=1, linestyle=DASHES[2])
    for i, method in enumerate(methods):
        axes.plot(
            [], [], MARKERS[i % len(MARKERS)], color=INK, markerfacecolor="none", label=method
        )
    for stage in STAGES:
        axes.plot([], [], "s", color=STAGE[stage], label=stage)
    axes.grid(visible=True)
    axes.margins(0.12)
    axes.set(xlabel="whole model, MB", ylabel="held-out NLL, nats a token")
    drawing.legend(figure, axes)
    return Picture(
        title=f"{model}: quality against size",
        caption="Held-out NLL against the size of the whole model; lower left is better. Hollow: "
        f"compressed, filled: repaired. The dotted front joins what no other point beats. {ERRORS}",
        spoken=f"Scatter plot of held-out NLL against megabytes for {model}. "
        + " ".join(f"{n[0]}: {n[1]}, NLL {n[2]}." for n in numbers),
        svg=drawing.to_svg(figure, name),
        columns=["model", "size", "NLL"],
        numbers=numbers,
    )


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one beats in size and NLL, by size."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _number(found: Estimate | None) -> str:
    return plus_minus(found.value, found.error) if found else ""


def _seeds(found: dict[str, Estimate | None]) -> str:
    return str(max(e.n for e in found.values() if e))
