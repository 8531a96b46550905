"""The figures of what happened inside: routing layer by layer, and validation KL by step."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from rerail.report import drawing
from rerail.report.cells import STAGES, Setting
from rerail.report.drawing import DASHES, LINES, MARKERS, Picture
from rerail.report.labels import short_label, varying
from rerail.report.panels import panels_of

_Row = tuple[str, dict[str, dict[int, float]]]
Grid = NDArray[np.float64]

MEASURES = {
    "load_entropy": ("load entropy", "1 is an even load of the experts, 0 is all on one"),
    "routing_changed": ("changed routing", "share of tokens that go to another set of experts"),
}


def heat_maps(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return heat maps (setting against stage and layer) of load entropy and changed routing."""
    pictures: list[Picture] = []
    for panel, measure in itertools.product(panels_of(settings, 18), MEASURES):
        if held := _rows(panel.settings, panel.fields, measure):
            key = f"{name}-{len(pictures)}"
            pictures.append(_heat_map(panel.title, measure, held, key, panel.paradigm))
    return pictures


def _rows(settings: Sequence[Setting], fields: Sequence[str], measure: str) -> list[_Row]:
    """Return (label, stage -> layer -> mean over seeds) of each setting with layers."""
    rows = []
    for setting in settings:
        stages = {stage: _means(setting, stage, measure) for stage in STAGES[1:]}
        known = {stage: layers for stage, layers in stages.items() if layers}
        if known:
            rows.append((short_label(setting.head, fields), known))
    return rows


def _means(setting: Setting, stage: str, measure: str) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for layer in (one for cell in setting.cells for one in cell.get(stage, "layers") or []):
        if layer.get(measure) is not None:
            values.setdefault(int(layer["layer"]), []).append(layer[measure])
    return {layer: float(np.mean(found)) for layer, found in sorted(values.items())}


def _heat_map(model: str, measure: str, rows: Sequence[_Row], name: str, paradigm: str) -> Picture:
    said, meaning = MEASURES[measure]
    layers = sorted({layer for _, stages in rows for per in stages.values() for layer in per})
    stages = [stage for stage in STAGES if any(stage in held for _, held in rows)]
    grid = np.full((len(rows), (len(layers) + 1) * len(stages) - 1), np.nan)
    for (row, (_, held)), (part, stage) in itertools.product(enumerate(rows), enumerate(stages)):
        for column, layer in enumerate(layers):
            grid[row, part * (len(layers) + 1) + column] = held.get(stage, {}).get(layer, np.nan)
    figure, axes = drawing.canvas(0.85 + 0.26 * len(rows), max(4.6, 2.0 + 0.14 * grid.shape[1]))
    _draw_grid(axes, grid, print_numbers=grid.shape[1] <= 13 and len(rows) <= 12)
    _name_axes(axes, layers, stages)
    drawing.name_rows(axes, [i + 0.5 for i in range(len(rows))], [label for label, _ in rows])
    drawing.margins(axes, top=0.35)
    numbers = [
        [f"{label}, {stage}", *(f"{per[layer]:.3f}" if layer in per else "" for layer in layers)]
        for label, held in rows
        for stage, per in held.items()
    ]
    heard = [(f"{label}, {stage}", per) for label, held in rows for stage, per in held.items()]
    return Picture(
        title=f"{model}: {said} by layer",
        caption=f"{said.capitalize()}: {meaning}. A row a setting, a column "
        "a layer; from dark blue (0) over green (0.5) to yellow (1).",
        spoken=f"Heat map of {said} for {model}, layers {layers[0]} to {layers[-1]}. "
        + " ".join(f"{label}: mean {np.mean(list(per.values())):.2f}." for label, per in heard),
        svg=drawing.to_svg(figure, name),
        columns=["setting", *(f"layer {layer}" for layer in layers)],
        numbers=numbers,
        group=paradigm,
    )


def _draw_grid(axes: Axes, grid: Grid, *, print_numbers: bool) -> None:
    seamless: dict[str, Any] = {"edgecolor": "face", "linewidth": 0.3}
    axes.pcolormesh(np.ma.masked_invalid(grid), cmap="viridis", vmin=0, vmax=1, **seamless)
    if print_numbers:
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "#000000" if value > 0.45 else "#ffffff"
                place = (column + 0.5, row + 0.5)
                how: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5}
                axes.text(*place, f"{value:.2f}", color=colour, **how).set_in_layout(False)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _name_axes(axes: Axes, layers: Sequence[int], stages: Sequence[str]) -> None:
    """Name the layers below and the stages above."""
    step = max(1, len(layers) // 6)
    ticks, words = [], []
    for part, stage in enumerate(stages):
        start = part * (len(layers) + 1)
        ticks += [start + i + 0.5 for i in range(0, len(layers), step)]
        words += [str(layer) for layer in layers[::step]]
        how: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 9}
        axes.text(start + len(layers) / 2, -0.12, stage, **how)
    axes.set_xticks(ticks, words)
    axes.set_xlabel("layer")


def training_curves(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return a panel a model: validation KL by step, a line a cell."""
    fields = varying(settings)
    found = [
        _curves(panel.title, panel.settings, fields, f"{name}-{i}", panel.paradigm)
        for i, panel in enumerate(panels_of(settings, 7))
    ]
    return [picture for picture in found if picture]


def _curves(
    model: str, settings: Sequence[Setting], fields: Sequence[str], name: str, paradigm: str
) -> Picture | None:
    figure, axes = drawing.canvas(2.6)
    numbers = []
    for i, setting in enumerate(settings):
        for cell in setting.cells:
            points = [
                (point["step"], point["val_kl"])
                for point in cell.get("repaired", "curve") or []
                if point.get("val_kl") is not None
            ]
            if not points:
                continue
            label = short_label(setting.head, fields)
            if len(setting.cells) > 1:
                label += f", seed {cell.head['seed']}"
            axes.plot(
                *zip(*points, strict=True),
                color=LINES[i % len(LINES)],
                linestyle=DASHES[i % len(DASHES)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=3.5,
                label=label if cell is setting.cells[0] else "_",
            )
            best = min(points, key=lambda point: point[1])
            kls = [points[0][1], best[1], points[-1][1]]
            numbers.append([label, *(f"{kl:.4f}" for kl in kls), str(best[0]), str(points[-1][0])])
    if not numbers:
        return None
    axes.set_ylim(bottom=0)
    axes.grid(visible=True)
    axes.set(xlabel="optimiser step", ylabel="validation KL, nats a token")
    drawing.legend(figure, axes)
    return Picture(
        title=f"{model}: validation KL during the repair",
        caption="KL from the teacher on calibration blocks that are not trained on; the best step "
        "is kept.",
        spoken=f"Line chart of validation KL by step for {model}. "
        + " ".join(
            f"{n[0]}: first {n[1]}, best {n[2]} at step {n[4]}, last {n[3]}." for n in numbers
        ),
        svg=drawing.to_svg(figure, name),
        columns=["cell", "first KL", "best KL", "last KL", "best step", "last step"],
        numbers=numbers,
        group=paradigm,
    )
