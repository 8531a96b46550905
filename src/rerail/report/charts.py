"""The charts of quality: what was lost, what came back, and against which size or budget.

Each function yields its charts for settings that were measured on the same held-out tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rerail.report.chart import Axis, Chart, Marks, Plot, Rule
from rerail.report.frame import (
    MANY,
    Results,
    by,
    by_paradigm,
    mean_interval,
    parts,
    varying,
)
from rerail.report.svg import DASHES, GRAIN, INK, LINES, MARKERS, SOFT, STAGE, within
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


class Panel(NamedTuple):
    """The settings of one figure: of one model, of one paradigm where they are many, in parts."""

    title: str
    paradigm: str
    settings: pd.DataFrame
    fields: Sequence[str]


def panels(settings: pd.DataFrame, at_most: int) -> Iterator[Panel]:
    """Yield panels of at most this many settings; `fields` vary among all those of the model."""
    for model, whole in by(settings, "model"):
        for paradigm, group in by_paradigm(whole):
            for part, some in parts(group, at_most):
                title = f"{model}{paradigm and f', {paradigm}'}{part}"
                yield Panel(title, paradigm, some, varying(whole))


def labels_of(settings: pd.DataFrame, fields: Sequence[str]) -> list[str]:
    """Return short labels."""
    return [short_label(head, fields) for head in settings["head"]]


def marks_of(found: pd.DataFrame, x: object, y: object, **columns: object) -> pd.DataFrame:
    """Return the marks of estimates that have a value."""
    return found.assign(x=x, y=y, **columns).dropna(subset=["x", "y"])


def written(found: pd.DataFrame) -> list[str]:
    """Return NLLs with their errors."""
    return [plus_minus(e.value, e.error) for e in found.itertuples()]


def before_after(results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield, by model, NLL before and after the repair as points, that of the teacher as a line."""
    fields = varying(settings)
    for panel in panels(settings, 20):
        labels = labels_of(panel.settings, fields)
        found = {n: results.estimate(panel.settings, "nll", n) for n in STAGES}
        values = pd.DataFrame({n: e["value"] for n, e in found.items()})
        end = within(values)
        rows = np.arange(len(labels))
        marks = [
            Marks(
                marks_of(found[stage], found[stage]["value"], rows + shift),
                label=stage,
                colour=STAGE[stage],
                size=5.5,
                hollow=stage == "compressed",
            )
            for stage, shift in (("compressed", -0.14), ("repaired", 0.14))
        ]
        # the words stand behind the longest whisker of a row
        reach = pd.concat([e["value"] + e["error"].fillna(0) for e in found.values()], axis=1)
        words = [
            " → ".join(f"{v:.3f}" for v in row[1:] if pd.notna(v)) for row in values.to_numpy()
        ]
        behind = {"x": reach.max(axis=1).clip(upper=end), "y": rows, "words": words}
        marks.append(Marks(pd.DataFrame(behind), marker=""))
        teacher = values["teacher"].iloc[0]
        rules = [Rule(teacher, "teacher", STAGE["teacher"], DASHES[1])] if pd.notna(teacher) else []
        seeds = pd.concat([e["n"] for e in found.values()], axis=1).max(axis=1).map(str)
        columns = [labels, *map(written, found.values()), seeds]
        yield Chart(
            title=f"{panel.title}: before and after the repair",
            caption="Held-out NLL; lower is better, the dashed line is the teacher. "
            + ("" if end == np.inf else f"{FAR} ")
            + ERRORS,
            opening=f"Chart of held-out NLL for {panel.title}.",
            columns=["setting", *STAGES, "seeds"],
            numbers=[list(row) for row in zip(*columns, strict=True)],
            sentence="{0}: teacher {1}, compressed {2}, repaired {3}.",
            drawing=Plot(
                marks,
                Axis(NLL, end=end, margin=0.06),
                Axis(rows=labels),
                "x",
                height=0.75 + 0.27 * len(labels),
                rules=rules,
            ),
            group=panel.paradigm,
        )


def pareto(results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield, by model, NLL against bytes, with the front of what no other point beats."""
    for model, part in by(settings, "model"):
        points = _plane(results, part)
        end = within(points["y"]) if len(points) else np.inf
        ordered = points.sort_values(["x", "y"], kind="stable")
        front = ordered[ordered["y"] < ordered["y"].cummin().shift(fill_value=np.inf)]
        best = "; ".join(f"{i} {name}" for i, name in enumerate(front["name"], 1))
        yield Chart(
            title=f"{model}: quality against size",
            caption="Held-out NLL against the size of the whole model; lower left is better. "
            "Hollow: compressed, filled: repaired. The dotted front joins what no other point "
            f"beats: {best}. "
            + ("" if end == np.inf else f"{FAR} ")
            + (ERRORS if len(part) <= MANY else "The errors are in the numbers."),
            opening=f"Scatter plot of held-out NLL against megabytes for {model}. "
            f"The front: {best}.",
            columns=["model", "size", "NLL"],
            numbers=[
                [p.name, f"{p.x:,.2f} MB", plus_minus(p.y, p.error)]
                for p in points.itertuples(index=False)
            ],
            sentence="{0}: {1}, NLL {2}.",
            drawing=Plot(
                [*_plane_marks(points, len(part) <= MANY), _front(front, end)],
                Axis("whole model, MB", margin=0.12),
                Axis(NLL, end=end, margin=0.12),
                "y",
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
        found = results.estimate(settings, "nll", stage)
        size = results.estimate(settings, "bytes", stage)["value"] / 1e6
        names = ["teacher" if stage == "teacher" else f"{label}, {stage}" for label in labels]
        points = found.assign(place=range(len(found)), stage=stage, kind=kind, name=names)
        points = marks_of(points, size, found["value"])
        stages.append(points[points["place"] == 0] if stage == "teacher" else points)
    return pd.concat(stages).sort_values("place", kind="stable")


def _plane_marks(points: pd.DataFrame, whiskers: bool) -> list[Marks]:
    """Return a series for each stage (colour) and method (marker), and one each for the legend."""
    kinds = sorted(set(points.loc[points["stage"] != "teacher", "kind"]))
    marker = {kind: MARKERS[i % len(MARKERS)] for i, kind in enumerate(kinds)}
    shown = points if whiskers else points.assign(error=np.nan)
    none = shown.iloc[:0]
    marks = []
    for (stage, kind), some in shown.groupby(["stage", "kind"], sort=False):
        star = stage == "teacher"
        look: dict[str, Any] = {"colour": STAGE[stage], "hollow": stage == "compressed"}
        marks.append(
            Marks(some, marker="*" if star else marker[kind], size=11 if star else 6.5, **look)
        )
    marks += [Marks(none, kind, marker=marker[kind], hollow=True) for kind in kinds]
    for stage in STAGES:
        look = {"marker": "*" if stage == "teacher" else "s", "hollow": stage == "compressed"}
        marks.append(Marks(none, stage, STAGE[stage], **look))
    return marks


def _front(front: pd.DataFrame, end: float) -> Marks:
    words = [str(i) for i in range(1, len(front) + 1)]
    line = pd.DataFrame({"x": front["x"], "y": front["y"].clip(upper=end), "words": words})
    look: dict[str, Any] = {"colour": SOFT, "line": DASHES[2], "marker": ""}
    return Marks(line, steps=True, offset=(-8, -6), **look)


def _bars(
    data: pd.DataFrame, colours: Mapping[str, str], title: str, caption: str, group: str = ""
) -> Chart:
    """Return recovery as bars: a row of bars for each `key` of the data, a bar for each `series`.

    Where a value is missing, its `note` says why.
    """
    rows = data.drop_duplicates("key").set_index("key")["row"]
    width = 0.8 / len(colours)
    words = data["value"].map(percent).where(data["value"].notna(), data["note"])
    data = data.assign(place=data["key"].map(list(rows.index).index), words=words)
    marks = []
    for i, (series, colour) in enumerate(colours.items()):
        some = data[data["series"] == series]
        y = some["place"] + (i - (len(colours) - 1) / 2) * width
        bars = some.assign(x=some["value"].fillna(0), y=y, error=some["half"])
        marks.append(Marks(bars, series, colour, bars=width * 0.92, offset=(4, 0)))
    return Chart(
        title=title,
        caption=caption,
        opening="Bar chart of recovery.",
        columns=["setting", "bar", "recovery", "95 % interval", "note"],
        numbers=[
            [e.row, e.series, share(e.value, e.error), interval(e.value, e.half), e.note]
            for e in data.sort_values("place", kind="stable").itertuples()
        ],
        sentence="{0} on {1}: {value}.",
        drawing=Plot(
            marks,
            Axis("recovered share of the lost NLL", shares=True, margin=0.04),
            Axis(rows=list(rows)),
            "x",
            height=0.75 + (0.2 + 0.24 * len(colours)) * len(rows),
            rules=[Rule(0)],
        ),
        group=group,
    )


def notes(settings: pd.DataFrame, found: pd.DataFrame) -> list[str]:
    """Return the number of seeds of each estimate, or why there is none."""
    said = []
    for n, cells, blank in zip(found["n"], settings["cells"], settings["blank"], strict=True):
        seeds = f"{n} of {len(cells)} seeds" if len(cells) > 1 else "one seed"
        said.append(seeds if n else blank)
    return said


def _twin_bars(results: Results, settings: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    """Return the bars of settings: those that differ in the model only are one row."""
    found = results.estimate(settings, "recovery")
    first = settings.drop_duplicates("twin").set_index("twin")["head"]
    rows = [short_label(first[twin], fields) for twin in settings["twin"]]
    return found.assign(
        key=settings["twin"], row=rows, series=settings["model"], note=notes(settings, found)
    )


def _model_colours(settings: pd.DataFrame) -> dict[str, str]:
    return {
        model: GRAIN.get(grain, INK)
        for model, grain in zip(settings["model"], settings["granularity"], strict=True)
    }


def fine_against_coarse(results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield recovery of fine and coarse models, method by method; nothing without both."""
    pairs = results.pairs(settings)
    used = settings.loc[pd.unique(pairs.to_numpy().ravel())]
    rows = used.drop_duplicates("twin")
    caption = "Share of the lost held-out NLL that the repair brought back, for settings that "
    caption += f"both models have. {INTERVALS} Those of several seeds hold for their mean."
    groups = list(by_paradigm(rows))
    if len(groups) > 1:
        yield from _paradigm_means(results, settings, pairs)
    for paradigm, group in groups:
        for part, some in parts(group, 12):
            title = f"Recovery, fine against coarse{paradigm and f', {paradigm}'}{part}"
            data = _twin_bars(results, used[used["twin"].isin(some["twin"])], varying(used))
            yield _bars(data, _model_colours(used), title, caption, paradigm)


def _paradigm_means(
    results: Results, settings: pd.DataFrame, pairs: pd.DataFrame
) -> Iterator[Chart]:
    """Yield the mean of each paradigm over its settings, where one figure cannot hold them."""
    sides = {n: results.estimate(settings.loc[pairs[n]], "recovery")["value"] for n in GRAIN}
    both = pd.DataFrame({name: side.to_numpy() for name, side in sides.items()})
    both["paradigm"] = settings.loc[pairs["fine"], "paradigm"].fillna("other").to_numpy()
    records = []
    for paradigm, held in both.dropna().groupby("paradigm", sort=False):
        gap, half, n = mean_interval(held["fine"] - held["coarse"])
        above = (held["fine"] > held["coarse"]).sum()
        note = f"{above} of {n} settings more on fine; mean of fine - coarse "
        note += f"{percent(gap)} ({interval(gap, half) or 'one setting'})"
        for grain in GRAIN:
            mean, half, _ = mean_interval(held[grain])
            said = note if grain == "fine" else ""
            records.append((f"{paradigm} ({n})", grain, mean, half / 1.96, half, said))
    caption = "Mean over the settings (their number in brackets) of which fine and coarse model "
    caption += "both have a recovery. Whiskers: 95 % intervals by Student's t over the settings, "
    caption += "so they show how much methods differ; methods of one family are alike."
    if records:
        columns = ["row", "series", "value", "error", "half", "note"]
        data = pd.DataFrame(records, columns=columns)
        data["key"] = data["row"]
        yield _bars(data, GRAIN, "Recovery by paradigm", caption)


def by_calibration(results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield recovery by calibration text, method by method, where there are several texts."""
    used = results.series_over("calibration", settings)
    fields = [*dict.fromkeys(["calibration", *varying(used)])]
    caption = "Share of the lost held-out NLL that the repair brought back, by the text that "
    caption += f"statistics and repair have seen. {INTERVALS}"
    for part, some in parts(used.drop_duplicates("twin"), 12):
        data = _twin_bars(results, used[used["twin"].isin(some["twin"])], fields)
        title = f"Recovery by calibration text{part}"
        yield _bars(data, _model_colours(used), title, caption)


def by_heldout_text(results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield recovery on each held-out text on its own, by calibration text and model."""
    used = results.series_over("calibration", settings)
    fields = [*dict.fromkeys(["calibration", *varying(used)])]
    caption = "Share of the NLL lost on one held-out text that came back, by the text that "
    caption += f"statistics and repair have seen: in and out of its domain. {INTERVALS}"
    for model, whole in by(used, "model"):
        texts = sorted({text for head in whole["head"] for text in head["nll_by"] or {}})
        for part, some in parts(whole, 8):
            rows = {"key": some.index, "row": labels_of(some, fields), "note": some["blank"]}
            each = [
                results.estimate(some, "recovery", text=text).assign(series=text, **rows)
                for text in texts
            ]
            title = f"{model}: recovery on each held-out text{part}"
            colours = dict(zip(texts, LINES * len(texts), strict=False))
            yield _bars(pd.concat(each), colours, title, caption)


class Line(NamedTuple):
    """A line of a figure: the settings along it, its label and its looks."""

    settings: pd.DataFrame
    label: str
    colour: str
    line: object
    marker: str


def _lines(series: pd.DataFrame, column: str) -> list[Line]:
    """Name lines and give each a look: colour by method if there are several, dash by model."""
    methods = list(dict.fromkeys(series["compressor"]))
    fields = [name for name in varying(series) if name != column]
    ends = series.drop_duplicates("series")
    kinds = list(dict.fromkeys(zip(ends["granularity"], ends["model"], strict=True)))
    lines = []
    for i, (_, part) in enumerate(series.groupby("series", sort=False)):
        head = part["head"].iloc[0]
        several = len(methods) > 1
        colour = GRAIN.get(head["granularity"], INK)
        if several:
            colour = LINES[methods.index(part["compressor"].iloc[0]) % len(LINES)]
        dash = kinds.index((head["granularity"], head["model"])) if several else i
        label = f"{head['model']} {short_label(head, fields)}"
        marker = MARKERS[i % len(MARKERS)]
        lines.append(Line(part, label, colour, DASHES[dash % len(DASHES)], marker))
    return lines


def recovery_over(column: str, results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield recovery against ratio, bits or samples; none where there is one value only."""
    series = results.series_over(column, settings)
    methods = series.assign(compressor=series["compressor"].fillna("?"))
    for paradigm, group in by_paradigm(methods.drop_duplicates("compressor")):
        for part, some in parts(group, METHODS):
            inside = methods[methods["compressor"].isin(some["compressor"])]
            # the lines of one method stand together
            order = inside["compressor"].map(list(some["compressor"]).index)
            yield _recovery(
                column, results, inside.loc[order.sort_values(kind="stable").index], part, paradigm
            )


def _recovery(
    column: str, results: Results, series: pd.DataFrame, part: str, paradigm: str
) -> Chart:
    marks: list[Marks] = []
    numbers: list[list[str]] = []
    for line in _lines(series, column):
        found = results.estimate(line.settings, "recovery")
        at = line.settings["at"]
        data = marks_of(found, at.astype(float), found["value"], error=found["half"])
        look: dict[str, Any] = {
            "colour": line.colour,
            "line": line.line,
            "marker": line.marker,
            "size": 5,
        }
        marks.append(Marks(data, line.label, **look))
        note = notes(line.settings, found)
        for place, e, said in zip(at, found.itertuples(), note, strict=True):
            recovery = [share(e.value, e.error), interval(e.value, e.half)]
            numbers.append([line.label, number(place), *recovery, said])
    who = ", ".join(dict.fromkeys(series["compressor"]))
    return Chart(
        title=f"{who}: recovery against {ALONG[column]}",
        caption=f"Recovered share of the lost held-out NLL{part}. {INTERVALS} Long ones are cut; "
        "the numbers have them.",
        opening=f"Line chart of recovery against {ALONG[column]} for {who}.",
        columns=["series", column, "recovery", "95 % interval", "note"],
        numbers=numbers,
        sentence="{0} at {1}: {value}.",
        drawing=Plot(
            marks,
            Axis(ALONG[column], ticks=list(series["at"]), log2=column == "samples"),
            Axis("recovery", shares=True, cut=True),
            "y",
            height=2.6,
            rules=[Rule(0)],
        ),
        group=paradigm,
    )


def loss_over(column: str, results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield NLL against bits, or of skippers against the experts they compute, model by model."""
    along = "skip" if column == "active_experts" else column
    for model, group in by(settings, "model"):
        series = results.series_over(along, group)
        place = series["at"]
        if column == "active_experts":
            place = results.estimate(series, column)["value"]
        series = series.assign(at=place.astype(float))
        for part, some in parts(series.drop_duplicates("series"), METHODS):
            inside = series[series["series"].isin(some["series"])]
            yield _loss(column, model + part, results, inside)


def _loss(column: str, title: str, results: Results, series: pd.DataFrame) -> Chart:
    fields = [name for name in varying(series) if name not in (column, "skip")]
    ends = pd.concat([results.estimate(series, "nll", stage)["value"] for stage in STAGES[1:]])
    end = within(ends)
    marks: list[Marks] = []
    numbers: list[list[str]] = []
    for i, (_, part) in enumerate(series.groupby("series", sort=False)):
        line = part.sort_values("at", kind="stable")
        label = short_label(part["head"].iloc[0], fields)
        found = {stage: results.estimate(line, "nll", stage) for stage in STAGES[1:]}
        for stage, dash in (("compressed", DASHES[1]), ("repaired", DASHES[0])):
            data = marks_of(found[stage], line["at"], found[stage]["value"])
            look: dict[str, Any] = {
                "colour": LINES[i % len(LINES)],
                "marker": MARKERS[i],
                "line": dash,
            }
            marks.append(
                Marks(
                    data.drop(columns="error"),
                    f"{label}, {stage}",
                    hollow=stage == "compressed",
                    **look,
                )
            )
        budgets = labels_of(line, ["ratio", *fields])
        places = [f"{at:.4g}" for at in line["at"].fillna(0)]
        numbers += map(list, zip(budgets, places, *map(written, found.values()), strict=True))
    rules = []
    if pd.notna(teacher := results.estimate(series, "nll", "teacher")["value"].iloc[0]):
        rules = [Rule(teacher, "teacher", line=DASHES[2])]
        end = max(end, teacher)
    said = ALONG[column]
    return Chart(
        title=f"{title}: NLL against {said}",
        caption="Held-out NLL; dashed: compressed, full: repaired. What lies far above is cut off; "
        "the numbers have it.",
        opening=f"Line chart of held-out NLL against {said} for {title}.",
        columns=["setting", said, "compressed", "repaired"],
        numbers=numbers,
        sentence="{0} at {1}: compressed {2}, repaired {3}.",
        drawing=Plot(
            marks,
            Axis(said, ticks=list(series["at"]) if column == "bits" else ()),
            Axis(NLL, end=end),
            "y",
            height=2.6,
            rules=rules,
        ),
    )


def forest(results: Results, settings: pd.DataFrame) -> Iterator[Chart]:
    """Yield fine minus coarse with its interval, a row a pair, where there are several seeds."""
    gaps = results.differences(results.pairs(settings))
    gaps = gaps[gaps["n"] > 1]
    fields = varying(settings.loc[pd.unique(gaps[["fine", "coarse"]].to_numpy().ravel())])
    fine = settings.loc[gaps["fine"]].reset_index(drop=True)
    gaps = gaps.assign(paradigm=fine["paradigm"].to_numpy(), row=labels_of(fine, fields))
    for paradigm, group in by_paradigm(gaps):
        for part, some in parts(group, 20):
            data = some.assign(x=some["value"], y=range(len(some)), error=some["half"])
            yield Chart(
                title=f"Fine minus coarse, paired by seed{paradigm and f', {paradigm}'}{part}",
                caption="Difference of the recoveries with its 95 % interval by Student's t over "
                "seeds; to the right of zero the fine model recovers more.",
                opening="Chart of the difference in recovery between the fine and the coarse "
                "model.",
                columns=["setting", "fine - coarse", "95 % interval", "seeds"],
                numbers=[
                    [e.row, percent(e.value), interval(e.value, e.half), str(e.n)]
                    for e in some.itertuples()
                ],
                sentence="{0}: {1}, {2}, {3} seeds.",
                drawing=Plot(
                    [Marks(data)],
                    Axis("recovery of fine - coarse", shares=True, margin=0.1),
                    Axis(rows=list(some["row"])),
                    "x",
                    height=1.1 + 0.27 * len(some),
                    rules=[Rule(0)],
                ),
                group=paradigm,
            )
