"""The figure of which experts are used: load by expert, layer by layer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from rerail.track import drawing
from rerail.track.cells import STAGES, Setting, by_model, by_paradigm
from rerail.track.drawing import Picture, panels
from rerail.track.labels import short_label, varying

Loads = NDArray[np.float64]
MOST = 4.0  # times an even share; what is more has the same colour
LAYER, BAND = 0.15, 1.4  # inches of a layer, and at most of a setting


class _Band(NamedTuple):
    """A setting.

    Attributes:
        label: its name.
        layers: their indices.
        stages: stage -> loads (layers, experts) over an even share; NaN where an expert is gone.
    """

    label: str
    layers: Sequence[int]
    stages: dict[str, Loads]


def load_maps(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return heat maps of how often each expert is chosen, stage by stage."""
    pictures: list[Picture] = []
    for model, whole in by_model(settings).items():
        fields = varying(whole)
        for paradigm, group in by_paradigm(whole).items():
            bands = [band for s in group if (band := _band(s, short_label(s.head, fields)))]
            for part, some in panels(bands, 8):
                title = f"{model}{paradigm and f', {paradigm}'}{part}"
                pictures.append(_picture(title, some, f"{name}-{len(pictures)}", paradigm))
    return pictures


def _band(setting: Setting, label: str) -> _Band | None:
    layers: Sequence[int] = ()
    stages = {}
    for stage in STAGES:
        held = [
            known
            for cell in setting.cells
            if (known := [one for one in cell.get(stage, "layers") or [] if one.get("load")])
        ]
        if held:
            layers = [one["layer"] for one in held[0]]
            shares = [[one["load"] for one in known] for known in held]
            stages[stage] = _over_even(np.array(shares, float))
    return _Band(label, layers, stages) if stages else None


def _over_even(shares: Loads) -> Loads:
    """Return the mean over seeds of shares (seeds, layers, experts), 1 where the load is even."""
    there = ~np.isnan(shares)
    mean = np.nansum(shares, axis=0) / np.maximum(there.sum(axis=0), 1)
    return np.where(there.any(axis=0), mean * shares.shape[-1], np.nan)


def _picture(title: str, bands: Sequence[_Band], name: str, paradigm: str) -> Picture:
    layers, experts = next(iter(bands[0].stages.values())).shape
    figure, axes = drawing.canvas(0.85 + len(bands) * min(LAYER * (layers + 1), BAND))
    _draw(axes, bands, layers, experts)
    drawing.name_rows(
        axes,
        [i * (layers + 1) + layers / 2 for i in range(len(bands))],
        [band.label for band in bands],
    )
    drawing.margins(axes, top=0.35)
    numbers = [
        [f"{band.label}, {stage}", *_numbers(loads, band.layers)]
        for band in bands
        for stage, loads in band.stages.items()
    ]
    heard = [f"{n[0]}: busiest {n[1]} times an even share, hardly used {n[3]}." for n in numbers]
    return Picture(
        title=f"{title}: load by expert",
        caption="How often each expert is chosen, over an even share: from dark blue (never) over "
        f"green ({MOST / 2:g} times) to yellow ({MOST:g} times or more); empty where it is gone. "
        f"For each setting its {layers} layers from top to bottom.",
        spoken=f"Heat map of the load of {experts} experts in {layers} layers for {title}. "
        + " ".join(heard),
        svg=drawing.to_svg(figure, name),
        columns=["setting", "busiest", "where", "under a tenth of even", "gone"],
        numbers=numbers,
        group=paradigm,
    )


def _draw(axes: Axes, bands: Sequence[_Band], layers: int, experts: int) -> None:
    """Draw settings below each other, their stages side by side."""
    stages = [stage for stage in STAGES if any(stage in band.stages for band in bands)]
    step = experts + max(1, experts // 16)
    grid = np.full((len(bands) * (layers + 1) - 1, len(stages) * step), np.nan)
    for i, band in enumerate(bands):
        for stage, loads in band.stages.items():
            row, column = i * (layers + 1), stages.index(stage) * step
            grid[row : row + layers, column : column + experts] = loads
    drawing.pixels(axes, grid, MOST)
    for i, stage in enumerate(stages):
        how: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 9}
        axes.text(i * step + experts / 2, -0.3, stage, **how)
    axes.set_xticks([])
    axes.set_xlabel(f"experts 0 to {experts - 1}")


def _numbers(loads: Loads, layers: Sequence[int]) -> list[str]:
    there = ~np.isnan(loads)
    row, expert = divmod(int(np.nanargmax(loads)), loads.shape[1])
    rare = int((loads[there] < 0.1).sum())
    return [
        f"{loads[row, expert]:.2f}",
        f"layer {layers[row]}, expert {expert}",
        f"{rare} of {there.sum()}",
        str(int((~there).sum())),
    ]
