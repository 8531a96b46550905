"""What seeds say: means with intervals, and fine minus coarse paired seed by seed."""

from collections.abc import Sequence

from matplotlib.ticker import FuncFormatter

from rerail.report import drawing
from rerail.report.cells import Setting, by_paradigm
from rerail.report.comparison import Difference, difference, pairs_of
from rerail.report.drawing import INK, SOFT, Picture, panels
from rerail.report.labels import label_of, short_label, varying
from rerail.report.page import Shown, table
from rerail.report.words import interval, percent, plus_minus, share

Compared = tuple[Setting, Setting, Difference]


def means(settings: Sequence[Setting]) -> str:
    """Return a table of means over seeds; empty where no setting has several."""
    several = [s for s in settings if len(s.cells) > 1]
    fields = [*dict.fromkeys(["ratio", *varying(settings)])]
    rows: list[list[Shown | str]] = []
    for setting in several:
        row: list[Shown | str] = [setting.head["model"], label_of(setting.head, fields)]
        for stage, column in (("compressed", "nll"), ("repaired", "nll"), ("repaired", "kl")):
            one = setting.estimate(stage, column)
            said = plus_minus(one.value, one.error) if one else ""
            row.append(Shown(said, sort=one.value if one else None))
        found = setting.estimate("repaired", "recovery")
        said = share(found.value, found.error) if found else setting.no_recovery
        row.append(Shown(said, sort=found.value if found else None))
        row.append(interval(found.value, found.half_interval) if found else "")
        row.append(f"{found.n if found else 0} of {len(setting.cells)}")
        rows.append(row)
    if not rows:
        return ""
    columns = ["model", "setting", "NLL compressed", "NLL repaired", "KL repaired", "recovery"]
    caption = "Mean ± standard deviation over seeds, and the 95 % interval of the mean recovery by "
    caption += "Student's t; n counts the seeds that have a recovery."
    return table(caption, [*columns, "95 % interval", "n"], rows, class_="sortable")


def compared(settings: Sequence[Setting]) -> list[Compared]:
    """Return the pairs of a fine and a coarse setting that share a seed, with their difference."""
    found = [(*pair, difference(*pair)) for pair in pairs_of(settings)]
    return [(fine, coarse, gap) for fine, coarse, gap in found if gap]


def differences(settings: Sequence[Setting]) -> str:
    """Return a table of fine minus coarse; empty without a pair."""
    held = compared(settings)
    if not held:
        return ""
    fields = varying(setting for fine, coarse, _ in held for setting in (fine, coarse))
    rows: list[list[Shown | str]] = []
    for fine, coarse, gap in held:
        row: list[Shown | str] = [
            label_of(fine.head, fields),
            f"{fine.head['model']} - {coarse.head['model']}",
        ]
        for setting in (fine, coarse):
            one = setting.estimate("repaired", "recovery")
            row.append(Shown(share(one.value, one.error) if one else "", sort=one and one.value))
        row.append(Shown(percent(gap.value), sort=gap.value))
        row += [interval(gap.value, gap.half), _verdict(gap), str(gap.n)]
        rows.append(row)
    caption = "Recovery of the fine model minus that of the coarse one in points, with its 95 % "
    caption += "interval: paired seed by seed, by Student's t; with one seed (n = 1) from the "
    caption += "standard errors of both, as if they were independent, so without what other seeds "
    caption += "would change. The intervals are not adjusted for the number of rows."
    columns = ["setting", "models", "fine", "coarse", "fine - coarse", "95 % interval", "more", "n"]
    return table(caption, columns, rows, class_="sortable")


def _verdict(gap: Difference) -> str:
    if gap.half is None or abs(gap.value) <= gap.half:
        return "undecided"
    return "fine" if gap.value > 0 else "coarse"


def forest(settings: Sequence[Setting], name: str) -> list[Picture]:
    """Return fine minus coarse with its interval, a row a setting, where there are seeds."""
    held = [one for one in compared(settings) if one[2].n > 1]
    fields = varying(setting for fine, coarse, _ in held for setting in (fine, coarse))
    return [
        _forest(part, some, fields, f"{name}-{paradigm}-{i}", paradigm)
        for paradigm, group in by_paradigm(held, lambda one: one[0].head).items()
        for i, (part, some) in enumerate(panels(group, 20))
    ]


def _forest(
    part: str, held: Sequence[Compared], fields: Sequence[str], name: str, paradigm: str
) -> Picture:
    figure, axes = drawing.canvas(1.1 + 0.27 * len(held))
    gaps = [gap for _, _, gap in held]
    axes.errorbar(
        [gap.value for gap in gaps],
        range(len(gaps)),
        xerr=[gap.half or 0.0 for gap in gaps],
        color=INK,
        marker="o",
        linestyle="none",
    )
    axes.axvline(0, color=SOFT, linewidth=0.8)
    labels = [short_label(fine.head, fields) for fine, _, _ in held]
    drawing.row_labels(axes, labels)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axes.margins(x=0.1)
    axes.set(xlabel="recovery of fine - coarse")
    numbers = [
        [label, percent(gap.value), interval(gap.value, gap.half), str(gap.n)]
        for label, gap in zip(labels, gaps, strict=True)
    ]
    return Picture(
        title=f"Fine minus coarse, paired by seed{paradigm and f', {paradigm}'}{part}",
        caption="Difference of the recoveries with its 95 % interval by Student's t over seeds; to "
        "the right of zero the fine model recovers more.",
        spoken="Chart of the difference in recovery between the fine and the coarse model. "
        + " ".join(f"{n[0]}: {n[1]}, {n[2]}, {n[3]} seeds." for n in numbers),
        svg=drawing.to_svg(figure, name),
        columns=["setting", "fine - coarse", "95 % interval", "seeds"],
        numbers=numbers,
        group=paradigm,
    )
