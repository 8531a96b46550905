"""The charts of what happened inside: routing layer by layer, and validation KL by step."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from rerail.report.chart import Axis, Chart, HeatMap, Marks, Plot
from rerail.report.charts import labels_of, panels
from rerail.report.frame import varying
from rerail.report.svg import DASHES, LINES, MARKERS
from rerail.run.results import STAGES

MEASURES = {
    "load_entropy": ("load entropy", "1 is an even load of the experts, 0 is all on one"),
    "routing_changed": ("changed routing", "share of tokens that go to another set of experts"),
}
MOST = 4.0  # times an even share; what is more has the same colour
LAYER, BAND = 0.15, 1.4  # inches of a layer, and at most of a setting


def layers_of(settings: pd.DataFrame, value: str) -> pd.DataFrame:
    """Return one row a setting, seed, stage and layer that has the value, in this order."""
    records = [
        (setting, STAGES.index(row["stage"]), int(layer["layer"]), layer.get(value))
        for setting, cells in enumerate(settings["cells"])
        for cell in cells
        for row in cell.rows
        for layer in row["layers"] or ()
        if layer.get(value) is not None
    ]
    return pd.DataFrame(records, columns=["setting", "stage", "layer", value])


def heat_maps(settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield heat maps (setting against stage and layer) of load entropy and changed routing."""
    for panel in panels(settings, 18):
        labels = labels_of(panel.settings, panel.fields)
        for measure, (said, meaning) in MEASURES.items():
            frame = layers_of(panel.settings, measure)
            frame = frame[frame["stage"] > 0]  # the teacher's routing is what others are held to
            means = frame.groupby(["setting", "stage", "layer"])[measure].mean().sort_index()
            if means.empty:
                continue
            layers = sorted(set(frame["layer"]))
            grid = means.unstack(["stage", "layer"]).sort_index(axis=1)
            grid = grid.rename(columns=dict(enumerate(STAGES)), level=0)
            each = means.unstack("layer").reindex(columns=layers)
            names = [f"{labels[i]}, {STAGES[stage]}" for i, stage in each.index]
            average = dict(zip(names, each.mean(axis=1), strict=True))
            columns = len(grid.columns.levels[0]) * (len(layers) + 1) - 1
            yield Chart(
                title=f"{panel.title}: {said} by layer",
                caption=f"{said.capitalize()}: {meaning}. A row a setting, a column a layer; from "
                "dark blue (0) over green (0.5) to yellow (1).",
                opening=f"Heat map of {said} for {panel.title}, layers {layers[0]} to "
                f"{layers[-1]}. "
                + " ".join(f"{name}: mean {mean:.2f}." for name, mean in average.items()),
                columns=["setting", *(f"layer {layer}" for layer in layers)],
                numbers=[
                    [name, *("" if np.isnan(v) else f"{v:.3f}" for v in row)]
                    for name, row in zip(names, each.to_numpy(), strict=True)
                ],
                sentence="",
                drawing=HeatMap(
                    grid,
                    [(i + 0.5, labels[setting]) for i, setting in enumerate(grid.index)],
                    most=1.0,
                    label="layer",
                    height=0.85 + 0.26 * len(grid),
                    width=max(4.6, 2.0 + 0.14 * columns),
                ),
                group=panel.paradigm,
            )


def load_maps(settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield heat maps of how often each expert is chosen, stage by stage."""
    for panel in panels(settings, 8):
        loads = _loads(panel.settings)
        if loads.empty:
            continue
        labels = labels_of(panel.settings, panel.fields)
        by_stage = loads.groupby(["setting", "stage"])
        rows = int(loads.groupby(["setting", "stage"])["layer"].nunique().max())
        experts = int(loads["expert"].max()) + 1
        grid = _bands(loads, rows)
        count = len(set(loads["setting"]))
        middles = [i * (rows + 1) + rows / 2 for i in range(count)]
        names = [labels[setting] for setting in sorted(set(loads["setting"]))]
        yield Chart(
            title=f"{panel.title}: load by expert",
            caption="How often each expert is chosen, over an even share: from dark blue (never) "
            f"over green ({MOST / 2:g} times) to yellow ({MOST:g} times or more); empty where it "
            f"is gone. For each setting its {rows} layers from top to bottom.",
            opening=f"Heat map of the load of {experts} experts in {rows} layers for "
            f"{panel.title}.",
            columns=["setting", "busiest", "where", "under a tenth of even", "gone"],
            numbers=[
                [f"{labels[setting]}, {STAGES[stage]}", *_summary(part)]
                for (setting, stage), part in by_stage
            ],
            sentence="{0}: busiest {1} times an even share, hardly used {3}.",
            drawing=HeatMap(
                grid,
                list(zip(middles, names, strict=True)),
                most=MOST,
                label=f"experts 0 to {experts - 1}",
                height=0.85 + count * min(LAYER * (rows + 1), BAND),
                image=True,
            ),
            group=panel.paradigm,
        )


def _loads(settings: pd.DataFrame) -> pd.DataFrame:
    """Return the mean load over seeds by setting, stage, layer and expert, 1 where it is even.

    It is NaN where the expert is gone.
    """
    frame = layers_of(settings, "load")
    frame["expert"] = [range(len(shares)) for shares in frame["load"]]
    frame["experts"] = frame["load"].map(len)
    frame = frame[frame["experts"] > 0].explode(["load", "expert"])
    frame["load"] = frame["load"].astype(float) * frame["experts"]
    return frame.groupby(["setting", "stage", "layer", "expert"])["load"].mean().reset_index()


def _bands(loads: pd.DataFrame, rows: int) -> pd.DataFrame:
    """Return settings below each other, a row a layer and an empty one between, stages beside."""
    bands = []
    for _, part in loads.groupby("setting"):
        band = part.pivot(index="layer", columns=["stage", "expert"], values="load")
        bands.append(band.reset_index(drop=True).reindex(range(rows + 1)))
    grid = pd.concat(bands).sort_index(axis=1).iloc[:-1]
    return grid.rename(columns=dict(enumerate(STAGES)), level=0)


def _summary(part: pd.DataFrame) -> list[str]:
    """Return the busiest expert, where it is, how many are hardly used and how many are gone."""
    loads = part["load"].dropna()
    most = part.loc[loads.idxmax()]
    return [
        f"{most['load']:.2f}",
        f"layer {most['layer']:.0f}, expert {most['expert']:.0f}",
        f"{(loads < 0.1).sum()} of {len(loads)}",
        str(len(part) - len(loads)),
    ]


def training_curves(settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield a panel a model: validation KL by step, a line a cell."""
    fields = varying(settings)
    for panel in panels(settings, 7):
        marks, numbers = [], []
        labels = labels_of(panel.settings, fields)
        for i, (cells, name) in enumerate(zip(panel.settings["cells"], labels, strict=True)):
            look: dict[str, Any] = {
                "colour": LINES[i % len(LINES)],
                "line": DASHES[i % len(DASHES)],
                "marker": MARKERS[i % len(MARKERS)],
            }
            for cell in cells:
                curve = pd.DataFrame(
                    cell.get("repaired", "curve") or (), columns=["step", "val_kl"]
                )
                curve = curve.dropna(subset="val_kl").astype({"val_kl": float})
                if curve.empty:
                    continue
                label = f"{name}, seed {cell.head['seed']}" if len(cells) > 1 else name
                data = curve.rename(columns={"step": "x", "val_kl": "y"})
                shown = label if cell is cells[0] else ""
                marks.append(Marks(data, shown, size=3.5, **look))
                best = curve.loc[curve["val_kl"].idxmin()]
                kls = [curve["val_kl"].iloc[0], best["val_kl"], curve["val_kl"].iloc[-1]]
                steps = [f"{best['step']:g}", f"{curve['step'].iloc[-1]:g}"]
                numbers.append([label, *(f"{kl:.4f}" for kl in kls), *steps])
        if not numbers:
            continue
        yield Chart(
            title=f"{panel.title}: validation KL during the repair",
            caption="KL from the teacher on calibration blocks that are not trained on; the best "
            "step is kept.",
            opening=f"Line chart of validation KL by step for {panel.title}.",
            columns=["cell", "first KL", "best KL", "last KL", "best step", "last step"],
            numbers=numbers,
            sentence="{0}: first {1}, best {2} at step {4}, last {3}.",
            drawing=Plot(
                marks,
                Axis("optimiser step"),
                Axis("validation KL, nats a token", start=0),
                "y",
                height=2.6,
            ),
            group=panel.paradigm,
        )
