"""The charts of what happened inside: routing layer by layer, and validation KL by step."""

from collections.abc import Iterator

import pandas as pd

from rerail.report.chart import Axis, Chart, HeatMap, Marks, Plot
from rerail.report.charts import labels_of, line_look, panels
from rerail.report.frame import varying
from rerail.run.results import STAGES

MEASURES = {
    "load_entropy": ("load entropy", "1 is an even load of the experts, 0 is all on one"),
    "routing_changed": ("changed routing", "share of tokens that go to another set of experts"),
}
MOST = 4.0  # times an even share; what is more has the same colour
LAYER, BAND = 0.15, 1.4  # inches of a layer, and at most of a setting


def layers_of(settings: pd.DataFrame, value: str) -> pd.DataFrame:
    """Return one row a seed and layer that has the value; setting and stage are their places."""
    records = [
        (setting, STAGES.index(row["stage"]), int(layer["layer"]), layer.get(value))
        for setting, cells in enumerate(settings["cells"])
        for row in (row for cell in cells for row in cell.rows)
        for layer in row["layers"] or ()
    ]
    frame = pd.DataFrame(records, columns=["setting", "stage", "layer", value])
    return frame.dropna(subset=value)


def heat_maps(settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield heat maps (setting against stage and layer) of load entropy and changed routing."""
    for panel in panels(settings, 18):
        labels = labels_of(panel.settings, panel.fields)
        for measure, (words, meaning) in MEASURES.items():
            frame = layers_of(panel.settings, measure)
            frame = frame[frame["stage"] > 0]  # the teacher's routing is what others differ from
            means = frame.groupby(["setting", "stage", "layer"])[measure].mean().unstack("layer")
            if means.empty:
                continue
            names = [f"{labels[setting]}, {STAGES[stage]}" for setting, stage in means.index]
            averages = zip(names, means.mean(axis=1), strict=True)
            grid = means.unstack("stage").swaplevel(axis=1).sort_index(axis=1)
            layers = list(means.columns)
            width = 2.0 + 0.14 * (grid.columns.levshape[0] * (len(layers) + 1) - 1)
            yield Chart(
                title=f"{panel.title}: {words} by layer",
                caption=f"{words.capitalize()}: {meaning}. A row a setting, a column a layer; from "
                "dark blue (0) over green (0.5) to yellow (1).",
                opening=f"Heat map of {words} for {panel.title}, layers {layers[0]} to "
                f"{layers[-1]}. "
                + " ".join(f"{name}: mean {mean:.2f}." for name, mean in averages),
                numbers={"setting": names}
                | {f"layer {i}": ["" if v != v else f"{v:.3f}" for v in means[i]] for i in layers},
                sentence="",
                drawing=HeatMap(
                    grid.rename(columns=dict(enumerate(STAGES)), level=0),
                    [(i + 0.5, labels[setting]) for i, setting in enumerate(grid.index)],
                    label="layer",
                    height=0.85 + 0.26 * len(grid),
                    width=max(4.6, width),
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
        stages = loads.groupby(["setting", "stage"])
        rows, last = int(stages["layer"].nunique().max()), int(loads["expert"].max())
        names = [f"{labels[setting]}, {STAGES[stage]}" for setting, stage in stages.groups]
        columns = ("busiest", "where", "under a tenth of even", "gone")
        summaries = zip(*(_summary(part) for _, part in stages), strict=True)
        bands = [labels[setting] for setting in sorted(set(loads["setting"]))]
        yield Chart(
            title=f"{panel.title}: load by expert",
            caption="How often each expert is chosen, over an even share: from dark blue (never) "
            f"over green ({MOST / 2:g} times) to yellow ({MOST:g} times or more); empty where it "
            f"is gone. For each setting its {rows} layers from top to bottom.",
            opening=f"Heat map of the load of {last + 1} experts in {rows} layers for "
            f"{panel.title}.",
            numbers={"setting": names, **dict(zip(columns, summaries, strict=True))},
            sentence="{0}: busiest {1} times an even share, hardly used {3}.",
            drawing=HeatMap(
                _bands(loads, rows),
                [(i * (rows + 1) + rows / 2, label) for i, label in enumerate(bands)],
                label=f"experts 0 to {last}",
                height=0.85 + len(bands) * min(LAYER * (rows + 1), BAND),
                most=MOST,
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
    # a share times the number of experts is 1 where the load is even
    frame["load"] = frame["load"].astype(float) * frame["experts"]
    return frame.groupby(["setting", "stage", "layer", "expert"])["load"].mean().reset_index()


def _bands(loads: pd.DataFrame, rows: int) -> pd.DataFrame:
    """Return settings below each other, a row a layer and an empty one between, stages beside."""
    bands = [
        part.pivot(index="layer", columns=["stage", "expert"], values="load")
        .reset_index(drop=True)
        .reindex(range(rows + 1))
        for _, part in loads.groupby("setting")
    ]
    grid = pd.concat(bands).sort_index(axis=1).iloc[:-1]
    return grid.rename(columns=dict(enumerate(STAGES)), level=0)


def _summary(part: pd.DataFrame) -> list[str]:
    """Return the busiest expert, where it is, how many are hardly used and how many are gone."""
    loads = part["load"].dropna()
    most = part.loc[loads.idxmax()]
    where = f"layer {most['layer']:.0f}, expert {most['expert']:.0f}"
    rare = f"{(loads < 0.1).sum()} of {len(loads)}"
    return [f"{most['load']:.2f}", where, rare, str(len(part) - len(loads))]


def training_curves(settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield a panel a model: validation KL by step, a line a cell."""
    fields = varying(settings)
    columns = ("cell", "first KL", "best KL", "last KL", "best step", "last step")
    for panel in panels(settings, 7):
        marks: list[Marks] = []
        rows: list[list[str]] = []
        labels = labels_of(panel.settings, fields)
        for i, (cells, name) in enumerate(zip(panel.settings["cells"], labels, strict=True)):
            for cell in cells:
                points = pd.DataFrame(
                    cell.get("repaired", "curve") or (), columns=["step", "val_kl"]
                )
                curve = points.astype(float).dropna(subset="val_kl").set_axis(["x", "y"], axis=1)
                if curve.empty:
                    continue
                label = f"{name}, seed {cell.head['seed']}" if len(cells) > 1 else name
                shown = label if cell is cells[0] else ""
                marks.append(Marks(curve, shown, line_look(i) | {"markersize": 3.5}))
                first, best, last = curve.iloc[0], curve.loc[curve["y"].idxmin()], curve.iloc[-1]
                kls = [f"{point['y']:.4f}" for point in (first, best, last)]
                rows.append([label, *kls, f"{best['x']:g}", f"{last['x']:g}"])
        if not rows:
            continue
        yield Chart(
            title=f"{panel.title}: validation KL during the repair",
            caption="KL from the teacher on calibration blocks that are not trained on; the best "
            "step is kept.",
            opening=f"Line chart of validation KL by step for {panel.title}.",
            numbers=dict(zip(columns, zip(*rows, strict=True), strict=True)),
            sentence="{0}: first {1}, best {2} at step {4}, last {3}.",
            drawing=Plot(
                marks, Axis("optimiser step"), Axis("validation KL, nats a token", start=0)
            ),
            group=panel.paradigm,
        )
