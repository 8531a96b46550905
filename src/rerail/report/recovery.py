"""The figures of recovery as bars, with 95 % intervals: fine against coarse, text against text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import FuncFormatter

from rerail.report import drawing
from rerail.report.cells import (
    Estimate,
    Setting,
    by_model,
    by_paradigm,
    choices_without,
    series_over,
)
from rerail.report.comparison import mean_difference, pairs_of
from rerail.report.drawing import GRAIN, INK, LINES, SOFT, Bar, Picture, panels
from rerail.report.labels import short_label, varying
from rerail.report.words import interval, percent, share

INTERVALS = "Whiskers: 95 % intervals."
PERCENT = FuncFormatter(lambda value, _: percent(value))


@dataclass(frozen=True)
class _Row:
    """A row of bars: its label, and for each series an estimate or why there is none, and a note.

    Attributes:
        label: of the row.
        bars: series -> (estimate or None, note).
    """

    label: str
    bars: Mapping[str, tuple[Estimate | None, str]]


def fine_against_coarse(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return recovery of fine and coarse models, method by method; nothing without both."""
    pairs = pairs_of(settings)
    paired = [setting for pair in pairs for setting in pair]
    rows: dict[str, dict[str, Setting]] = {}
    for setting in paired:
        row = rows.setdefault(choices_without(setting.head, ["model"]), {})
        row[setting.head["model"]] = setting
    fields, colours = varying(paired), _colours(paired)
    caption = "Share of the lost held-out NLL that the repair brought back, for settings that "
    caption += f"both models have. {INTERVALS} Those of several seeds hold for their mean."
    groups = by_paradigm(list(rows.values()), lambda row: next(iter(row.values())).head)
    return _by_paradigm(pairs, name, several=len(groups) > 1) + [
        _drawn(
            f"Recovery, fine against coarse{paradigm and f', {paradigm}'}{part}",
            caption,
            [_row(row, fields) for row in some],
            colours,
            f"{name}-{paradigm}-{i}",
            paradigm,
        )
        for paradigm, held in groups.items()
        for i, (part, some) in enumerate(panels(held, 12))
    ]


def _by_paradigm(
    pairs: Sequence[tuple[Setting, Setting]], name: str, several: bool
) -> list[Picture]:
    """Return the mean of each paradigm over its settings, where one figure cannot hold them."""
    known: dict[str, list[tuple[float, float]]] = {}
    for fine, coarse in pairs:
        found = [setting.estimate("repaired", "recovery") for setting in (fine, coarse)]
        if found[0] and found[1]:
            paradigm = fine.head["paradigm"] or "other"
            known.setdefault(paradigm, []).append((found[0].value, found[1].value))
    if not known or not several:
        return []
    rows = []
    for paradigm, held in known.items():
        means = [mean_difference(side) for side in zip(*held, strict=True)]
        gap = mean_difference([fine - coarse for fine, coarse in held])
        above = sum(fine > coarse for fine, coarse in held)
        note = f"{above} of {gap.n} settings more on fine; mean of fine - coarse "
        note += f"{percent(gap.value)} ({interval(gap.value, gap.half) or 'one setting'})"
        bars = {}
        for grain, mean in zip(GRAIN, means, strict=True):
            spread = None if mean.half is None else mean.half / 1.96
            bars[grain] = (Estimate(mean.value, spread, 1), note if grain == "fine" else "")
        rows.append(_Row(f"{paradigm} ({gap.n})", bars))
    caption = "Mean over the settings (their number in brackets) of which fine and coarse model "
    caption += "both have a recovery. Whiskers: 95 % intervals by Student's t over the settings, "
    caption += "so they show how much methods differ; methods of one family are alike."
    return [_drawn("Recovery by paradigm", caption, rows, GRAIN, f"{name}-all")]


def by_calibration(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return recovery by calibration text, method by method, where there are several texts."""
    rows: dict[str, dict[str, Setting]] = {}
    used = [setting for series in series_over("calibration", settings) for setting in series]
    fields = [*dict.fromkeys(["calibration", *varying(used)])]
    for setting in used:
        row = rows.setdefault(choices_without(setting.head, ["model"]), {})
        row[setting.head["model"]] = setting
    caption = "Share of the lost held-out NLL that the repair brought back, by the text that "
    caption += f"statistics and repair have seen. {INTERVALS}"
    return [
        _drawn(
            f"Recovery by calibration text{part}",
            caption,
            [_row(row, fields) for row in some],
            _colours(used),
            f"{name}-{i}",
        )
        for i, (part, some) in enumerate(panels(list(rows.values()), 12))
    ]


def by_heldout_text(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return recovery on each held-out text on its own, by calibration text and model."""
    used = [setting for series in series_over("calibration", settings) for setting in series]
    fields = [*dict.fromkeys(["calibration", *varying(used)])]
    pictures = []
    for i, (model, whole) in enumerate(by_model(used).items()):
        texts = sorted({text for s in whole for text in s.texts})
        colours = dict(zip(texts, LINES * len(texts), strict=False))
        for j, (part, some) in enumerate(panels(whole, 8)):
            rows = [
                _Row(short_label(s.head, fields), {t: (s.on_text(t), s.no_recovery) for t in texts})
                for s in some
            ]
            caption = "Share of the NLL lost on one held-out text that came back, by the text that "
            caption += f"statistics and repair have seen: in and out of its domain. {INTERVALS}"
            title = f"{model}: recovery on each held-out text{part}"
            pictures.append(_drawn(title, caption, rows, colours, f"{name}-{i}-{j}"))
    return pictures


def _colours(settings: Sequence[Setting]) -> dict[str, str]:
    return {s.head["model"]: GRAIN.get(s.head["granularity"], INK) for s in settings}


def _row(held: Mapping[str, Setting], fields: Sequence[str]) -> _Row:
    bars = {}
    for model, setting in held.items():
        found = setting.estimate("repaired", "recovery")
        bars[model] = (found, note_of(setting, found))
    return _Row(short_label(next(iter(held.values())).head, fields), bars)


def note_of(setting: Setting, found: Estimate | None) -> str:
    """Return the number of seeds of an estimate, or why there is none."""
    if not found:
        return setting.no_recovery
    return f"{found.n} of {len(setting.cells)} seeds" if len(setting.cells) > 1 else "one seed"


def _drawn(
    title: str,
    caption: str,
    rows: Sequence[_Row],
    colours: Mapping[str, str],
    name: str,
    group: str = "",
) -> Picture:
    """Return a bar chart, a bar of every series in every row."""
    figure, axes = drawing.canvas(0.75 + (0.2 + 0.24 * len(colours)) * len(rows))
    width = 0.8 / len(colours)
    drawn: list[Bar] = []
    for i, (series, colour) in enumerate(colours.items()):
        shift = (i - (len(colours) - 1) / 2) * width
        held = [
            _bar(place + shift, *row.bars[series])
            for place, row in enumerate(rows)
            if series in row.bars
        ]
        drawing.bars(axes, held, width * 0.92, colour, series)
        drawn += held
    drawing.row_labels(axes, [row.label for row in rows])
    axes.xaxis.set_major_formatter(PERCENT)
    axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.margins(x=0.04)
    drawing.room_for_words(axes, [drawing.end_of(bar) for bar in drawn], [b.text for b in drawn])
    axes.set(xlabel="recovered share of the lost NLL")
    drawing.legend(figure, axes)
    numbers = [
        [row.label, series, *words_of(found), note]
        for row in rows
        for series, (found, note) in row.bars.items()
    ]
    return Picture(
        title=title,
        caption=caption,
        spoken="Bar chart of recovery. "
        + " ".join(f"{n[0]} on {n[1]}: {n[2] or n[4]}." for n in numbers),
        svg=drawing.to_svg(figure, name),
        columns=["setting", "bar", "recovery", "95 % interval", "note"],
        numbers=numbers,
        group=group,
    )


def _bar(place: float, found: Estimate | None, note: str) -> Bar:
    if not found:
        return Bar(place, 0.0, None, note)
    return Bar(place, found.value, found.half_interval, percent(found.value))


def words_of(found: Estimate | None) -> list[str]:
    """Return a recovery with its error, and its interval."""
    if not found:
        return ["", ""]
    return [share(found.value, found.error), interval(found.value, found.half_interval)]
