"""The figure of which experts are used: load by expert, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from rerail.report import drawing
from rerail.report.cells import STAGES, Setting
from rerail.report.drawing import Picture
from rerail.report.labels import short_label
from rerail.report.panels import Panel, panels_of

Loads = NDArray[np.float64]
MOST = 4.0  # times an even share; what is more has the same colour
LAYER, BAND = 0.15, 1.4  # inches of a layer, and at most of a setting


class _Band(NamedTuple):
    """A setting.

    Attributes:
        label: its name.
        stages: stage -> layer -> loads (experts,) over an even share; NaN where an expert is gone.
    """

    label: str
    stages: dict[str, dict[int, Loads]]


def load_maps(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return heat maps of how often each expert is chosen, stage by stage."""
    pictures: list[Picture] = []
    for panel in panels_of(settings, 8):
        bands = [_band(setting, panel.fields) for setting in panel.settings]
        if bands := [band for band in bands if band.stages]:
            pictures.append(_picture(panel, bands, f"{name}-{len(pictures)}"))
    return pictures


def _band(setting: Setting, fields: Sequence[str]) -> _Band:
    stages: dict[str, dict[int, Loads]] = {}
    for stage in STAGES:
        shares: dict[int, list[Sequence[float | None]]] = {}
        for layer in (one for cell in setting.cells for one in cell.get(stage, "layers") or []):
            if layer.get("load"):
                shares.setdefault(int(layer["layer"]), []).append(layer["load"])
        if shares:
            stages[stage] = {i: _over_even(held) for i, held in sorted(shares.items())}
    return _Band(short_label(setting.head, fields), stages)


def _over_even(seeds: Sequence[Sequence[float | None]]) -> Loads:
    """Return the mean over seeds of a layer's shares (experts,), 1 where the load is even."""
    shares = np.array(seeds, float)
    there = ~np.isnan(shares)
    mean = np.nansum(shares, axis=0) / np.maximum(there.sum(axis=0), 1)
    return np.where(there.any(axis=0), mean * shares.shape[1], np.nan)


def _picture(panel: Panel, bands: Sequence[_Band], name: str) -> Picture:
    known = [layers for band in bands for layers in band.stages.values()]
    rows = max(map(len, known))
    experts = max(len(loads) for layers in known for loads in layers.values())
    figure, axes = drawing.canvas(0.85 + len(bands) * min(LAYER * (rows + 1), BAND))
    _draw(axes, bands, rows, experts)
    middles = [i * (rows + 1) + rows / 2 for i in range(len(bands))]
    drawing.name_rows(axes, middles, [band.label for band in bands])
    drawing.margins(axes, top=0.35)
    numbers = [
        [f"{band.label}, {stage}", *_numbers(layers)]
        for band in bands
        for stage, layers in band.stages.items()
    ]
    heard = [f"{n[0]}: busiest {n[1]} times an even share, hardly used {n[3]}." for n in numbers]
    return Picture(
        title=f"{panel.title}: load by expert",
        caption="How often each expert is chosen, over an even share: from dark blue (never) over "
        f"green ({MOST / 2:g} times) to yellow ({MOST:g} times or more); empty where it is gone. "
        f"For each setting its {rows} layers from top to bottom.",
        spoken=f"Heat map of the load of {experts} experts in {rows} layers for {panel.title}. "
        + " ".join(heard),
        svg=drawing.to_svg(figure, name),
        columns=["setting", "busiest", "where", "under a tenth of even", "gone"],
        numbers=numbers,
        group=panel.paradigm,
    )


def _draw(axes: Axes, bands: Sequence[_Band], rows: int, experts: int) -> None:
    """Draw settings below each other, their stages side by side."""
    stages = [stage for stage in STAGES if any(stage in band.stages for band in bands)]
    step = experts + max(1, experts // 16)
    grid = np.full((len(bands) * (rows + 1) - 1, len(stages) * step), np.nan)
    for i, band in enumerate(bands):
        for stage, layers in band.stages.items():
            column = stages.index(stage) * step
            for row, loads in enumerate(layers.values(), i * (rows + 1)):
                grid[row, column : column + len(loads)] = loads
    drawing.pixels(axes, grid, MOST)
    for i, stage in enumerate(stages):
        how: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 9}
        axes.text(i * step + experts / 2, -0.3, stage, **how)
    axes.set_xticks([])
    axes.set_xlabel(f"experts 0 to {experts - 1}")


def _numbers(layers: Mapping[int, Loads]) -> list[str]:
    most, layer, expert = max(
        (float(np.nanmax(loads)), -i, -int(np.nanargmax(loads))) for i, loads in layers.items()
    )
    whole = np.concatenate(list(layers.values()))
    there = whole[~np.isnan(whole)]
    return [
        f"{most:.2f}",
        f"layer {-layer}, expert {-expert}",
        f"{(there < 0.1).sum()} of {len(there)}",
        str(len(whole) - len(there)),
    ]
