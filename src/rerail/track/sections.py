"""The sections of the report, from what was found down to how to find it again."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rerail.track.cells import (
    STAGES,
    Cell,
    Setting,
    by_tokens,
    label_of,
    megabytes,
    plus_minus,
    share,
    tokens_label,
    tokens_of,
    varying,
)
from rerail.track.diagnostics import heat_maps, training_curves
from rerail.track.figures import before_after, pareto
from rerail.track.page import Shown, escaped, figures, section, table, tag, text
from rerail.track.recovery import fine_against_coarse, recovery_over


def overview(cells: Sequence[Cell]) -> str:
    """Return the table of all cells, also those that are not done."""
    if not cells:
        return section("Overview", text("p", "There are no result rows yet."), key="overview")
    fields = [*dict.fromkeys(["ratio", *varying(cells)])]
    fields += ["seed"] if len({cell.head["seed"] for cell in cells}) > 1 else []
    sets = [*dict.fromkeys(tokens_of(cell.head) for cell in cells if cell.done)]
    status = [] if all(cell.done for cell in cells) else ["status"]
    columns = ["model", "method", *status, *fields, "MB before", "MB after"]
    columns += [f"NLL {stage}" for stage in STAGES]
    columns += ["KL compressed", "KL repaired", "recovery", "seconds"]
    rows = [_overview_row(cell, bool(status), fields) for cell in cells]
    if len(sets) > 1:
        columns.append("held-out text")
        for cell, row in zip(cells, rows, strict=True):
            row.append(f"set {sets.index(tokens_of(cell.head)) + 1}" if cell.done else "")
    box = tag(
        "div",
        text("label", "Filter", for_="filter")
        + '<input id="filter" type="search" data-table="cells" placeholder="fine reap">'
        + text("output", "", for_="filter", aria_live="polite"),
        class_="filter",
        hidden="",
    )
    caption = (
        "One row a cell. NLL and KL in nats a token, each ± its standard error; MB are 10^6 bytes "
        "of the whole model in the checkpoint's dtype; ppl is the perplexity exp(NLL); seconds are "
        "those of all stages."
    )
    held = table(caption, columns, rows, id="cells", class_="sortable overview")
    return section("Overview", box, held, key="overview")


def _overview_row(cell: Cell, status: bool, fields: Sequence[str]) -> list[Shown | str]:
    head = cell.head
    row: list[Shown | str] = [
        Shown(head["model"] or "?", cell.get("teacher", "granularity") or ""),
        Shown(head["compressor"] or "?", head["paradigm"] or ""),
    ]
    row += [_status(cell)] if status else []
    for name in fields:
        value = head[name]
        number = isinstance(value, int | float)
        said = "" if value is None else f"{value:g}" if number else str(value)
        row.append(Shown(said, sort=float(value) if number else None))
    row += [_size(cell, "teacher"), _size(cell, "compressed")]
    for stage in STAGES:
        perplexity = cell.get(stage, "perplexity")
        note = "" if perplexity is None else f"ppl {perplexity:.2f}"
        row.append(_value(cell, stage, "nll", note))
    for stage in STAGES[1:]:
        kl, se = cell.get(stage, "kl"), cell.get(stage, "kl_se")
        row.append(Shown(plus_minus(kl, None), "" if se is None else f"± {se:.3f}", kl))
    recovery = cell.get("repaired", "recovery")
    said = share(recovery, cell.get("repaired", "recovery_se"))
    row.append(Shown(said, cell.no_recovery, recovery))
    row.append(Shown("" if cell.seconds is None else f"{cell.seconds:.0f}", sort=cell.seconds))
    return row


def _size(cell: Cell, stage: str) -> Shown:
    size, experts = cell.get(stage, "bytes"), cell.get(stage, "expert_bytes")
    note = "" if experts is None else f"experts {megabytes(experts)}"
    return Shown(megabytes(size), note, None if size is None else float(size))


def _value(cell: Cell, stage: str, column: str, note: str = "") -> Shown:
    value = cell.get(stage, column)
    return Shown(plus_minus(value, cell.get(stage, f"{column}_se")), note, value)


def unfinished(cells: Sequence[Cell]) -> str:
    """Return the cells that failed or do not apply, with their reasons."""
    rows = [
        [_name(cell), _status(cell), cell.head["reason"] or "", cell.head["key"] or ""]
        for cell in cells
        if not cell.done
    ]
    if not rows:
        return ""
    columns = ["cell", "status", "reason", "key"]
    held = table("Cells without a result", columns, rows, class_="sortable")
    return section("Failed and not applicable", held, key="unfinished")


def over_seeds(settings: Sequence[Setting]) -> str:
    """Return means over seeds, where a setting has several."""
    several = [s for s in settings if len(s.cells) > 1]
    fields = [*dict.fromkeys(["ratio", *varying(settings)])]
    rows = []
    for setting in several:
        row = [setting.head["model"], label_of(setting.head, fields)]
        for stage, column in (("compressed", "nll"), ("repaired", "nll"), ("repaired", "kl")):
            found = setting.estimate(stage, column)
            row.append(plus_minus(found.value, found.error) if found else "")
        found = setting.estimate("repaired", "recovery")
        row.append(share(found.value, found.error) if found else setting.no_recovery)
        row.append(f"{found.n if found else 0} of {len(setting.cells)}")
        rows.append(row)
    if not rows:
        return ""
    columns = ["model", "setting", "NLL compressed", "NLL repaired", "KL repaired", "recovery"]
    caption = "Mean ± standard deviation over seeds; n counts the seeds that have a recovery."
    held = table(caption, [*columns, "n"], rows, class_="sortable")
    return section("Means over seeds", held, key="seeds")


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
        pictures = [
            *fine_against_coarse(group, f"fc{i}"),
            *before_after(group, f"ba{i}"),
            *pareto(group, f"pa{i}"),
            *recovery_over("ratio", group, f"ra{i}"),
            *recovery_over("samples", group, f"sa{i}"),
        ]
        name = f"Set {i + 1}: " if len(groups) > 1 else "On "
        parts += [text("h3", name + tokens_label(group[0].head)), figures(pictures)]
    return section("Quality", *parts, key="quality")


def by_text(cells: Sequence[Cell]) -> str:
    """Return NLL for each held-out text on its own."""
    rows = []
    for cell in cells:
        for name in cell.get("teacher", "nll_by") or {}:
            held = [(cell.get(stage, "nll_by") or {}).get(name) or {} for stage in STAGES]
            numbers = [plus_minus(one.get("nll"), one.get("se")) for one in held]
            rows.append([_name(cell), name, *numbers, f"{held[0].get('tokens') or 0:,}"])
    if not rows:
        return ""
    columns = ["cell", "text", *STAGES, "tokens"]
    held_table = table("Held-out NLL by text", columns, rows, class_="sortable")
    details = tag("details", text("summary", f"{len(rows)} rows") + held_table)
    return section("Each text on its own", details, key="texts")


def benchmarks(cells: Sequence[Cell]) -> str:
    """Return what lm-eval found, where it was asked."""
    rows: list[list[Shown | str]] = []
    for cell in cells:
        scores: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for stage in STAGES:
            for one in cell.get(stage, "tasks") or []:
                scores.setdefault((one["task"], one["metric"]), {})[stage] = one
        for (task, metric), found in scores.items():
            held = [found.get(stage, {}) for stage in STAGES]
            numbers: list[Shown | str] = [
                Shown(plus_minus(one.get("value"), one.get("se")), sort=one.get("value"))
                for one in held
            ]
            count = next(str(one["n"]) for one in held if one)
            rows.append([_name(cell), task, metric, *numbers, count])
    if not rows:
        return ""
    columns = ["cell", "task", "metric", *STAGES, "documents"]
    caption = "lm-eval, each ± its standard error"
    return section("Tasks", table(caption, columns, rows, class_="sortable"), key="tasks")


def routing(settings: Sequence[Setting]) -> str:
    """Return the heat maps of routing."""
    return section("Routers, layer by layer", figures(heat_maps(settings, "hm")), key="routers")


def training(settings: Sequence[Setting]) -> str:
    """Return the training curves."""
    return section("Training", figures(training_curves(settings, "tc")), key="training")


def continuations(cells: Sequence[Cell]) -> str:
    """Return what the models wrote after the prompt, side by side; each prompt and cell apart."""
    parts = []
    for cell in cells:
        said = [
            tag("div", text("h4", stage) + text("p", cell.get(stage, "samples_text")), class_=stage)
            for stage in STAGES
            if cell.get(stage, "samples_text")
        ]
        if said:
            title = text("h3", _name(cell)) + tag(
                "p", "Prompt: " + tag("q", escaped(cell.head["prompt"])), class_="soft"
            )
            parts.append(tag("article", title + tag("div", "".join(said), class_="said")))
    return section("The same prompt continued", *parts, key="continuations")


def reproduce(cells: Sequence[Cell]) -> str:
    """Return the command, key, seed and revision of every cell."""
    rows = []
    for cell in cells:
        head = cell.head
        command = (head["choices"] or {}).get("command") or ""
        seed = "" if head["seed"] is None else str(head["seed"])
        rows.append([_name(cell), command, head["key"] or "", seed, head["revision"] or ""])
    if not rows:
        return ""
    columns = ["cell", "command", "key", "seed", "revision"]
    held = table("How to get each cell again", columns, rows, class_="commands")
    return section("Reproduce", held, key="reproduce")


def contents(body: Iterable[str]) -> str:
    """Return links to the sections that are there."""
    found = re.findall(r'<h2 id="([^"]+)-title">(.*?)</h2>', "".join(body))
    links = [tag("li", tag("a", title, href=f"#{key}")) for key, title in found]
    return tag("nav", tag("ul", "".join(links)), aria_label="Contents")


def _status(cell: Cell) -> str:
    return str(cell.head["status"]).replace("_", " ")


def _name(cell: Cell) -> str:
    """Return a short name of a cell."""
    head = cell.head
    parts = [head["model"] or "?", label_of(head, ["ratio", "samples"])]
    return ", ".join(parts) + ("" if head["seed"] is None else f", seed {head['seed']}")
