"""The figures of what happened inside: routing layer by layer, and validation KL by step."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rerail.track import drawing
from rerail.track.cells import Setting, by_model, short_label, varying
from rerail.track.drawing import DASHES, LINES, MARKERS, Picture, panels

MEASURES = {
    "load_entropy": ("load entropy", "1 is an even load of the experts, 0 is all on one"),
    "routing_changed": ("changed routing", "share of tokens that go to another set of experts"),
}


def heat_maps(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return heat maps (setting and stage against layer) of load entropy and of changed routing."""
    pictures: list[Picture] = []
    for model, group in by_model(settings).items():
        lines = _lines(group, varying(settings))
        for (part, some), measure in itertools.product(panels(lines, 24), MEASURES):
            held = [(label, per) for label, values in some if (per := values[measure])]
            if held:
                key = f"{name}-{len(pictures)}"
                pictures.append(_heat_map(model + part, measure, held, key))
    return pictures


def _lines(
    settings: Sequence[Setting], fields: Sequence[str]
) -> list[tuple[str, dict[str, dict[int, float]]]]:
    """Return (label, measure -> layer -> mean over seeds) of each setting and stage with layers."""
    lines = []
    for setting in settings:
        for stage in ("compressed", "repaired"):
            held = [layer for c in setting.cells for layer in c.get(stage, "layers") or []]
            if held:
                values = {measure: _means(held, measure) for measure in MEASURES}
                lines.append((f"{short_label(setting.head, fields)}, {stage}", values))
    return lines


def _means(held: Sequence[dict[str, float]], measure: str) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for layer in held:
        if layer.get(measure) is not None:
            values.setdefault(int(layer["layer"]), []).append(layer[measure])
    return {layer: float(np.mean(found)) for layer, found in sorted(values.items())}


def _heat_map(
    model: str, measure: str, lines: Sequence[tuple[str, dict[int, float]]], name: str
) -> Picture:
    said, meaning = MEASURES[measure]
    layers = sorted({layer for _, per in lines for layer in per})
    grid = np.array([[per.get(layer, np.nan) for layer in layers] for _, per in lines])
    figure, axes = drawing.canvas(1.0 + 0.3 * len(lines), width=max(4.6, 1.6 + 0.18 * len(layers)))
    seamless: dict[str, Any] = {"edgecolor": "face", "linewidth": 0.3}
    mesh = axes.pcolormesh(grid, cmap="viridis", vmin=0, vmax=1, **seamless)
    if len(layers) <= 8:
        for (row, column), value in np.ndenumerate(grid):
            colour = "#000000" if value > 0.45 else "#ffffff"
            place = (column + 0.5, row + 0.5)
            axes.annotate(f"{value:.2f}", place, ha="center", va="center", color=colour, fontsize=8)
    elif (scale := figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30)).solids:
        scale.solids.set(rasterized=False, **seamless)  # else it would be an embedded image
    step = max(1, len(layers) // 12)
    axes.set_xticks(np.arange(0, len(layers), step) + 0.5, [str(i) for i in layers[::step]])
    axes.set_yticks(np.arange(len(lines)) + 0.5, [drawing.brief(label) for label, _ in lines])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_xlabel("layer")
    numbers = [
        [label, *(f"{per[layer]:.3f}" if layer in per else "" for layer in layers)]
        for label, per in lines
    ]
    return Picture(
        title=f"{model}: {said} by layer",
        caption=f"{said.capitalize()}: {meaning}.",
        spoken=f"Heat map of {said} for {model}, layers {layers[0]} to {layers[-1]}. "
        + " ".join(f"{label}: mean {np.mean(list(per.values())):.2f}." for label, per in lines),
        svg=drawing.to_svg(figure, name),
        columns=["setting", *(f"layer {layer}" for layer in layers)],
        numbers=numbers,
    )


def training_curves(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return a panel a model: validation KL by step, a line a cell."""
    return [
        picture
        for i, (model, whole) in enumerate(by_model(settings).items())
        for j, (part, group) in enumerate(panels(whole, 6))
        if (picture := _curves(model + part, group, varying(settings), f"{name}-{i}-{j}"))
    ]


def _curves(
    model: str, settings: Sequence[Setting], fields: Sequence[str], name: str
) -> Picture | None:
    figure, axes = drawing.canvas(2.9 + 0.1 * len(settings))
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
                color=LINES[i],
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
    )
