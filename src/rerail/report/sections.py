"""The sections of the report that hold figures and texts."""

import re
from collections.abc import Iterable, Sequence

from rerail.report import seeds
from rerail.report.cells import STAGES, Cell, Setting, by_paradigm, by_tokens, tokens_label
from rerail.report.curves import loss_over, recovery_over
from rerail.report.diagnostics import heat_maps, training_curves
from rerail.report.figures import before_after, pareto
from rerail.report.labels import varying
from rerail.report.loads import load_maps
from rerail.report.page import figures, folded, section, tag, text
from rerail.report.recovery import by_calibration, by_heldout_text, fine_against_coarse
from rerail.report.tables import fold_many, name_of, prompt_of


def results(settings: Sequence[Setting]) -> str:
    """Return the figures of quality, apart for every set of held-out tokens."""
    groups = by_tokens(settings)
    parts = []
    if len(groups) > 1:
        said = f"The cells were measured on {len(groups)} different sets of held-out tokens. "
        said += "Numbers of different tokens cannot be compared: each set has figures of its own."
        parts.append(text("p", said, class_="warning"))
    if any(map(varying, groups.values())):
        said = "In the labels of the figures r is the ratio and n the number of samples."
        parts.append(text("p", said, class_="soft"))
    for i, group in enumerate(groups.values()):
        name = f"Set {i + 1}: " if len(groups) > 1 else "On "
        parts.append(text("h3", name + tokens_label(group[0].head)))
        for title, pictures in (
            ("", pareto(group, f"pa{i}")),
            ("Recovery, fine against coarse", fine_against_coarse(group, f"fc{i}")),
            ("Before and after the repair", before_after(group, f"ba{i}")),
            ("Against the removed share", recovery_over("ratio", group, f"ra{i}")),
            ("Against bits", loss_over("bits", group, f"bi{i}")),
            ("", recovery_over("bits", group, f"br{i}")),
            ("Against skipped experts", loss_over("active_experts", group, f"sk{i}")),
            ("Against the calibration size", recovery_over("samples", group, f"sa{i}")),
            ("By calibration text", by_calibration(group, f"ca{i}")),
            ("", by_heldout_text(group, f"ct{i}")),
        ):
            if pictures:
                parts += [text("h4", title) if title else "", figures(pictures)]
    return section("Quality", *parts, key="quality")


def over_seeds(settings: Sequence[Setting]) -> str:
    """Return means over seeds, and fine minus coarse; each set of held-out tokens by itself."""
    held = seeds.differences(settings)
    rows = held.count("<tr>") - 1
    return section(
        "Seeds and differences",
        seeds.means(settings),
        figures(seeds.forest(settings, "fo")),
        fold_many(held, rows) if held else "",
        key="seeds",
    )


def routing(settings: Sequence[Setting]) -> str:
    """Return the heat maps of routing."""
    pictures = [*heat_maps(settings, "hm"), *load_maps(settings, "lo")]
    return section("Routers, layer by layer", figures(pictures), key="routers")


def training(settings: Sequence[Setting]) -> str:
    """Return the training curves."""
    return section("Training", figures(training_curves(settings, "tc")), key="training")


def continuations(cells: Sequence[Cell]) -> str:
    """Return what the models wrote after the prompt, side by side; each prompt and cell apart."""
    parts = []
    for paradigm, held in by_paradigm(cells, lambda cell: cell.head).items():
        articles = [article for cell in held if (article := _continuation(cell))]
        if articles:
            title = f"{paradigm} ({len(articles)} cells)"
            inner = "".join(articles)
            parts.append(folded(title, inner) if paradigm else inner)
    return section("The same prompt continued", *parts, key="continuations")


def _continuation(cell: Cell) -> str:
    said = [
        tag("div", text("h4", stage) + text("p", cell.get(stage, "samples_text")), class_=stage)
        for stage in STAGES
        if cell.get(stage, "samples_text")
    ]
    if not said:
        return ""
    title = text("h3", name_of(cell)) + prompt_of(cell)
    return tag("article", title + tag("div", "".join(said), class_="said"))


def contents(body: Iterable[str]) -> str:
    """Return links to the sections that are there."""
    found = re.findall(r'<h2 id="([^"]+)-title">(.*?)</h2>', "".join(body))
    links = [tag("li", tag("a", title, href=f"#{key}")) for key, title in found]
    return tag("nav", tag("ul", "".join(links)), aria_label="Contents")
