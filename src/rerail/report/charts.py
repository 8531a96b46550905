"""The charts of quality: what was lost, what came back, and against which size or budget.

Each function yields its charts for settings that were measured on the same held-out tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rerail.report.chart import Axis, Chart, Marks, Plot
from rerail.report.frame import MANY, Results, by, mean_interval, parts, split, varying
from rerail.report.svg import DASHES, GRAIN, INK, LINES, MARKERS, PAPER, SOFT, STAGE, within
from rerail.report.words import interval, percent, plus_minus, share
from rerail.run.results import STAGES
from rerail.run.settings import number, short_label

NLL = "held-out NLL, nats a token"
ERRORS = "Whiskers: one standard error, or one standard deviation over seeds where n > 1."
INTERVALS = "Whiskers: 95 % intervals."
FAR = "A triangle at the edge stands for a value beyond it; the numbers have it."
ALONG = {
    "ratio": "removed share of the routed experts",
    "bits": "bits of an expert's number",
    "samples": "calibration blocks",
    "active_experts": "experts computed a token and layer",
}
METHODS = 4  # of one figure; each has a line a model
HOLLOW = {"markerfacecolor": PAPER}
LOOKS: dict[str, dict[str, Any]] = {n: {"color": STAGE[n]} for n in STAGES}
LOOKS["compressed"] |= HOLLOW


class Panel(NamedTuple):
    """The settings of one figure: of one model, of one paradigm where they are many, in parts."""

    title: str
    paradigm: str
    settings: pd.DataFrame
    fields: Sequence[str]


def panels(settings: pd.DataFrame, at_most: int) -> Iterator[Panel]:
    """Yield panels of at most this many settings; `fields` vary among all those of the model."""
    for model, whole in by(settings, "model"):
        for paradigm, title, some in split(whole, at_most):
            yield Panel(model + title, paradigm, some, varying(whole))


def labels_of(settings: pd.DataFrame, fields: Sequence[str]) -> list[str]:
    """Return short labels."""
    return [short_label(head, fields) for head in settings["head"]]


def line_look(i: int) -> dict[str, Any]:
    """Return the looks of line i."""
    colour, line = LINES[i % len(LINES)], DASHES[i % len(DASHES)]
    return {"color": colour, "linestyle": line, "marker": MARKERS[i % len(MARKERS)]}


def before_after(results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield, by model, NLL before and after the repair as points, that of the teacher as a line."""
    fields = varying(settings)
    for panel in panels(settings, 20):
        labels = labels_of(panel.settings, fields)
        rows = np.arange(len(labels))
        nll = {n: results.estimate(panel.settings, "nll", n) for n in STAGES}
        values = pd.DataFrame({n: e["value"] for n, e in nll.items()})
        end = within(values)
        marks = [
            Marks(nll[n].assign(x=values[n], y=rows + shift), n, LOOKS[n] | {"markersize": 5.5})
            for n, shift in (("compressed", -0.14), ("repaired", 0.14))
        ]
        # the words stand behind the longest whisker of a row
        reach = pd.DataFrame({n: e["value"] + e["error"].fillna(0) for n, e in nll.items()})
        words = [" → ".join(f"{v:.3f}" for v in row if v == v) for row in values.to_numpy()[:, 1:]]
        behind = {"x": reach.max(axis=1).clip(upper=end), "y": rows, "words": words}
        marks.append(Marks(pd.DataFrame(behind), style={"marker": ""}))
        written = {n: [*map(plus_minus, e["value"], e["error"])] for n, e in nll.items()}
        seeds = pd.DataFrame({n: e["n"] for n, e in nll.items()}).max(axis=1)
        far = "" if end == np.inf else f"{FAR} "
        yield Chart(
            title=f"{panel.title}: before and after the repair",
            caption=f"Held-out NLL; lower is better, the dashed line is the teacher. {far}{ERRORS}",
            opening=f"Chart of held-out NLL for {panel.title}.",
            numbers={"setting": labels, **written, "seeds": [*map(str, seeds)]},
            sentence="{0}: teacher {1}, compressed {2}, repaired {3}.",
            drawing=Plot(
                marks,
                Axis(NLL, end=end, margin=0.06),
                Axis(rows=labels),
                height=0.27,
                teacher=values["teacher"].iloc[0],
            ),
            group=panel.paradigm,
        )


def pareto(results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield, by model, NLL against bytes, with the front of what no other point beats."""
    for model, part in by(settings, "model"):
        points = _plane(results, part)
        end = within(points["y"]) if len(points) else np.inf
        ordered = points.sort_values(["x", "y"], kind="stable")
        # on the front is what lies below everything smaller than itself
        front = ordered[ordered["y"] < ordered["y"].cummin().shift(fill_value=np.inf)]
        best = "; ".join(f"{i} {name}" for i, name in enumerate(front["name"], 1))
        few = len(part) <= MANY
        far = "" if end == np.inf else f"{FAR} "
        yield Chart(
            title=f"{model}: quality against size",
            caption="Held-out NLL against the size of the whole model; lower left is better. "
            "Hollow: compressed, filled: repaired. The dotted front joins what no other point "
            f"beats: {best}. {far}{ERRORS if few else 'The errors are in the numbers.'}",
            opening=f"Scatter plot of held-out NLL against megabytes for {model}. "
            f"The front: {best}.",
            numbers={
                "model": [*points["name"]],
                "size": [f"{size:,.2f} MB" for size in points["x"]],
                "NLL": [*map(plus_minus, points["y"], points["error"])],
            },
            sentence="{0}: {1}, NLL {2}.",
            drawing=Plot(
                [*_plane_marks(points if few else points.assign(error=np.nan)), _front(front, end)],
                Axis("whole model, MB", margin=0.12),
                Axis(NLL, end=end, margin=0.12),
                height=3.2,
            ),
            most_spoken=40,
        )


def _plane(results: Results, settings: pd.DataFrame) -> pd.DataFrame:
    """Return x (MB), y (NLL), error, stage, kind and name of each model; the teacher once."""
    several = settings["compressor"].nunique(dropna=False) <= 6
    kind = settings["compressor" if several else "paradigm"].fillna("?")
    labels = labels_of(settings, varying(settings))
    stages = []
    for stage in STAGES:
        points = results.estimate(settings, "nll", stage).rename(columns={"value": "y"})
        points["x"] = results.estimate(settings, "bytes", stage)["value"] / 1e6
        names = ["teacher" if stage == "teacher" else f"{label}, {stage}" for label in labels]
        points = points.assign(place=range(len(labels)), stage=stage, kind=kind, name=names)
        stages.append(points.head(1) if stage == "teacher" else points)
    return pd.concat(stages).dropna(subset=["x", "y"]).sort_values("place", kind="stable")


def _plane_marks(points: pd.DataFrame) -> list[Marks]:
    """Return a series for each stage (colour) and method (marker), and one each for the legend."""
    kinds = sorted(set(points.loc[points["stage"] != "teacher", "kind"]))
    marker = {kind: MARKERS[i % len(MARKERS)] for i, kind in enumerate(kinds)}
    none = points.iloc[:0]
    marks = []
    for (stage, kind), some in points.groupby(["stage", "kind"], sort=False):
        star = {"marker": "*", "markersize": 11}
        shape = star if stage == "teacher" else {"marker": marker[kind], "markersize": 6.5}
        marks.append(Marks(some, style=LOOKS[stage] | shape))
    marks += [Marks(none, kind, HOLLOW | {"marker": marker[kind]}) for kind in kinds]
    shapes = {"teacher": "*", "compressed": "s", "repaired": "s"}
    return marks + [Marks(none, n, LOOKS[n] | {"marker": shape}) for n, shape in shapes.items()]


def _front(front: pd.DataFrame, end: float) -> Marks:
    words = [str(i) for i in range(1, len(front) + 1)]
    line = pd.DataFrame({"x": front["x"], "y": front["y"].clip(upper=end), "words": words})
    style = {"color": SOFT, "linestyle": DASHES[2], "marker": ""}
    return Marks(line, style=style, steps=True, offset=(-8, -6))


def _bars(
    data: pd.DataFrame, colours: Mapping[str, str], title: str, caption: str, group: str = ""
) -> Chart:
    """Return recovery as bars: a row of bars for each `key` of the data, a bar for each `series`.

    Where a value is missing, its `note` says why.
    """
    rows = data.drop_duplicates("key").set_index("key")["row"]
    width = 0.8 / len(colours)
    # the bars of a row stand side by side around its middle
    shifts = {s: (i - (len(colours) - 1) / 2) * width for i, s in enumerate(colours)}
    data = data.assign(
        y=data["key"].map(list(rows.index).index),
        x=data["value"].fillna(0),
        words=data["value"].map(percent).where(data["value"].notna(), data["note"]),
    ).sort_values("y", kind="stable")
    bars = data.assign(y=data["y"] + data["series"].map(shifts), error=data["half"])
    return Chart(
        title=title,
        caption=caption,
        opening="Bar chart of recovery.",
        numbers={"setting": [*data["row"]], "bar": [*data["series"]], **_recoveries(data)},
        sentence="{0} on {1}: {value}.",
        drawing=Plot(
            [
                Marks(bars[bars["series"] == n], n, {"color": c}, width * 0.92, offset=(4, 0))
                for n, c in colours.items()
            ],
            Axis("recovered share of the lost NLL", shares=True, margin=0.04),
            Axis(rows=[*rows]),
            height=0.2 + 0.24 * len(colours),
        ),
        group=group,
    )


def _recoveries(data: pd.DataFrame) -> dict[str, list[str]]:
    """Return the columns of numbers that describe a recovery."""
    return {
        "recovery": [*map(share, data["value"], data["error"])],
        "95 % interval": [*map(interval, data["value"], data["half"])],
        "note": [*data["note"]],
    }


def _recovery(results: Results, settings: pd.DataFrame) -> pd.DataFrame:
    """Return the recovery of settings; `note` is the number of seeds, or why there is none."""
    recovery = results.estimate(settings, "recovery")
    counts = settings["cells"].map(len)
    seeds = recovery["n"].map("{} of ".format) + counts.map("{} seeds".format)
    seeds = seeds.where(counts > 1, "one seed")
    return recovery.assign(note=settings["blank"].where(recovery["n"] == 0, seeds))


def _twin_bars(
    results: Results, settings: pd.DataFrame, fields: Sequence[str], title: str, caption: str
) -> Iterator[Chart]:
    """Yield bars by model: settings that differ in the model only are one row."""
    first = settings.drop_duplicates("twin")
    label = dict(zip(first["twin"], labels_of(first, fields), strict=True))
    grains = zip(settings["model"], settings["granularity"], strict=True)
    colours = {model: GRAIN.get(grain, INK) for model, grain in grains}
    for paradigm, part, some in split(first, 12):
        inside = settings[settings["twin"].isin(some["twin"])]
        names = {"key": inside["twin"], "row": inside["twin"].map(label)}
        data = _recovery(results, inside).assign(**names, series=inside["model"])
        yield _bars(data, colours, title + part, caption, paradigm)


def fine_against_coarse(results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield recovery of fine and coarse models, method by method; nothing without both."""
    pairs = results.pairs(settings)
    used = settings.loc[pd.unique(pairs.to_numpy().ravel())]
    caption = "Share of the lost held-out NLL that the repair brought back, for settings that "
    caption += f"both models have. {INTERVALS} Those of several seeds hold for their mean."
    charts = [*_twin_bars(results, used, varying(used), "Recovery, fine against coarse", caption)]
    if len({chart.group for chart in charts}) > 1:
        yield from _paradigm_means(results, settings, pairs)
    yield from charts


def _paradigm_means(
    results: Results, settings: pd.DataFrame, pairs: pd.DataFrame
) -> Iterator[Chart]:
    """Yield the mean of each paradigm over its settings, where one figure cannot hold them."""
    sides = {n: results.estimate(settings.loc[pairs[n]], "recovery")["value"] for n in GRAIN}
    both = pd.DataFrame({name: side.to_numpy() for name, side in sides.items()})
    both["paradigm"] = settings.loc[pairs["fine"], "paradigm"].fillna("other").to_numpy()
    bars = []
    for paradigm, part in both.dropna().groupby("paradigm", sort=False):
        gap, half, n = mean_interval(part["fine"] - part["coarse"])
        above = (part["fine"] > part["coarse"]).sum()
        note = f"{above} of {n} settings more on fine; mean of fine - coarse "
        note += f"{percent(gap)} ({interval(gap, half) or 'one setting'})"
        for grain in GRAIN:
            mean, half, _ = mean_interval(part[grain])
            bar = {"row": f"{paradigm} ({n})", "series": grain, "value": mean, "half": half}
            bars.append(bar | {"error": half / 1.96, "note": note if grain == "fine" else ""})
    caption = "Mean over the settings (their number in brackets) of which fine and coarse model "
    caption += "both have a recovery. Whiskers: 95 % intervals by Student's t over the settings, "
    caption += "so they show how much methods differ; methods of one family are alike."
    if bars:
        data = pd.DataFrame(bars)
        yield _bars(data.assign(key=data["row"]), GRAIN, "Recovery by paradigm", caption)


def by_calibration(results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield recovery by calibration text, then on each held-out text, where texts differ."""
    used = results.series_over("calibration", settings)
    fields = [*dict.fromkeys(["calibration", *varying(used)])]
    caption = "Share of the lost held-out NLL that the repair brought back, by the text that "
    caption += f"statistics and repair have seen. {INTERVALS}"
    yield from _twin_bars(results, used, fields, "Recovery by calibration text", caption)
    caption = "Share of the NLL lost on one held-out text that came back, by the text that "
    caption += f"statistics and repair have seen: in and out of its domain. {INTERVALS}"
    for model, whole in by(used, "model"):
        texts = sorted({text for head in whole["head"] for text in head["nll_by"] or {}})
        colours = dict(zip(texts, LINES * len(texts), strict=False))
        for part, some in parts(whole, 8):
            rows = {"key": some.index, "row": labels_of(some, fields), "note": some["blank"]}
            recovery = [results.estimate(some, "recovery", text=t).assign(series=t) for t in texts]
            data = pd.concat([text.assign(**rows) for text in recovery])
            yield _bars(data, colours, f"{model}: recovery on each held-out text{part}", caption)


def recovery_over(column: str, results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield recovery against ratio, bits or samples; none where there is one value only."""
    series = results.series_over(column, settings)
    series = series.assign(compressor=series["compressor"].fillna("?"))
    for paradigm, part, some in split(series.drop_duplicates("compressor"), METHODS):
        lines = [series[series["compressor"] == method] for method in some["compressor"]]
        yield _recovery_lines(column, results, pd.concat(lines), part, paradigm)


def _recovery_lines(
    column: str, results: Results, series: pd.DataFrame, part: str, paradigm: str
) -> Chart:
    """Return a line a series; with several methods, colours are theirs and dashes the models'."""
    methods = list(dict.fromkeys(series["compressor"]))
    models = list(dict.fromkeys(series["model"]))
    fields = [name for name in varying(series) if name != column]
    lines, marks = [], []
    for i, (_, line) in enumerate(series.groupby("series", sort=False)):
        head = line["head"].iloc[0]
        look = line_look(i) | {"markersize": 5, "color": GRAIN.get(head["granularity"], INK)}
        if len(methods) > 1:
            method, model = methods.index(line["compressor"].iloc[0]), models.index(head["model"])
            look |= {"color": line_look(method)["color"]}
            look |= {"linestyle": line_look(model)["linestyle"]}
        label = f"{head['model']} {short_label(head, fields)}"
        data = _recovery(results, line).assign(label=label, at=line["at"])
        lines.append(data)
        data = data.assign(x=data["at"].astype(float), y=data["value"], error=data["half"])
        marks.append(Marks(data.dropna(subset="y"), label, look))
    data = pd.concat(lines)
    names = {"series": [*data["label"]], column: [*map(number, data["at"])]}
    return Chart(
        title=f"{', '.join(methods)}: recovery against {ALONG[column]}",
        caption=f"Recovered share of the lost held-out NLL{part}. {INTERVALS} Long ones are cut; "
        "the numbers have them.",
        opening=f"Line chart of recovery against {ALONG[column]} for {', '.join(methods)}.",
        numbers={**names, **_recoveries(data)},
        sentence="{0} at {1}: {value}.",
        drawing=Plot(
            marks,
            Axis(ALONG[column], ticks=list(series["at"]), log2=column == "samples"),
            Axis("recovery", shares=True, cut=True),
        ),
        group=paradigm,
    )


def loss_over(column: str, results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield NLL against bits, or of skippers against the experts they compute, model by model."""
    for model, group in by(settings, "model"):
        series = results.series_over("skip" if column == "active_experts" else column, group)
        if column == "active_experts":
            series = series.assign(at=results.estimate(series, column)["value"])
        order = pd.factorize(series["series"])[0]
        series = series.assign(at=series["at"].astype(float), order=order)
        series = series.sort_values(["order", "at"], kind="stable")
        for part, some in parts(series.drop_duplicates("series"), METHODS):
            inside = series[series["series"].isin(some["series"])]
            yield _loss_lines(column, model + part, results, inside)


def _loss_lines(column: str, title: str, results: Results, series: pd.DataFrame) -> Chart:
    fields = [name for name in varying(series) if name not in (column, "skip")]
    nll = {n: results.estimate(series, "nll", n).assign(x=series["at"]) for n in STAGES}
    end = within(pd.concat([nll[n]["value"] for n in STAGES[1:]]))
    marks = []
    for i, (_, line) in enumerate(series.groupby("series", sort=False)):
        label = short_label(line["head"].iloc[0], fields)
        for stage, dash in (("compressed", DASHES[1]), ("repaired", DASHES[0])):
            points = nll[stage].loc[line.index].rename(columns={"value": "y"})
            look = line_look(i) | {"linestyle": dash} | (HOLLOW if stage == "compressed" else {})
            marks.append(Marks(points[["x", "y"]].dropna(), f"{label}, {stage}", look))
    teacher = nll["teacher"]["value"].iloc[0]
    return Chart(
        title=f"{title}: NLL against {ALONG[column]}",
        caption="Held-out NLL; dashed: compressed, full: repaired. What lies far above is cut off; "
        "the numbers have it.",
        opening=f"Line chart of held-out NLL against {ALONG[column]} for {title}.",
        numbers={
            "setting": labels_of(series, ["ratio", *fields]),
            ALONG[column]: [f"{at:.4g}" for at in series["at"].fillna(0)],
            **{n: [*map(plus_minus, nll[n]["value"], nll[n]["error"])] for n in STAGES[1:]},
        },
        sentence="{0} at {1}: compressed {2}, repaired {3}.",
        drawing=Plot(
            marks,
            Axis(ALONG[column], ticks=list(series["at"]) if column == "bits" else ()),
            Axis(NLL, end=np.nanmax([end, teacher])),
            teacher=teacher,
        ),
    )


def forest(results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield fine minus coarse with its interval, a row a pair, where there are several seeds."""
    gaps = results.differences(results.pairs(settings))
    gaps = gaps[gaps["n"] > 1]
    fields = varying(settings.loc[[*gaps["fine"], *gaps["coarse"]]])
    fine = settings.loc[gaps["fine"]]
    gaps = gaps.assign(paradigm=[*fine["paradigm"]], row=labels_of(fine, fields))
    for paradigm, part, some in split(gaps, 20):
        marks = Marks(some.assign(x=some["value"], y=range(len(some)), error=some["half"]))
        yield Chart(
            title=f"Fine minus coarse, paired by seed{part}",
            caption="Difference of the recoveries with its 95 % interval by Student's t over "
            "seeds; to the right of zero the fine model recovers more.",
            opening="Chart of the difference in recovery between the fine and the coarse model.",
            numbers={
                "setting": [*some["row"]],
                "fine - coarse": [*map(percent, some["value"])],
                "95 % interval": [*map(interval, some["value"], some["half"])],
                "seeds": [*map(str, some["n"])],
            },
            sentence="{0}: {1}, {2}, {3} seeds.",
            drawing=Plot(
                [marks],
                Axis("recovery of fine - coarse", shares=True, margin=0.1),
                Axis(rows=[*some["row"]]),
                height=0.27,
            ),
            group=paradigm,
        )
