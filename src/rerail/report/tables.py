"""The tables of the report: cells, sizes, what did not finish, and how to get each cell again."""

from collections.abc import Sequence
from typing import Any

from rerail.report.cells import STAGES, Cell, tokens_of
from rerail.report.labels import budget_of, columns_of, label_of, shown
from rerail.report.page import Shown, escaped, folded, search, section, table, tag, text
from rerail.report.words import megabytes, number, percent, plus_minus, share
from rerail.run.results import COLUMNS, Row

FEW = 24  # rows that need no folding


def overview(cells: Sequence[Cell], further: Sequence[str] = ()) -> str:
    """Return the table of all cells, also those that are not done.

    Args:
        cells: of all rows.
        further: names of columns that are added.
    """
    if not cells:
        return section("Overview", text("p", "There are no result rows yet."), key="overview")
    fields = columns_of(cells)
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
    for name in further:
        columns.append(name.replace("_", " "))
        for cell, row in zip(cells, rows, strict=True):
            row.append(_by_stage(cell, name))
    caption = (
        "One row a cell. NLL and KL in nats a token, each ± its standard error; MB are 10^6 bytes "
        "of the whole model in the checkpoint's dtype; ppl is the perplexity exp(NLL); seconds are "
        "those of all stages."
    )
    held = table(caption, columns, rows, id="cells", class_="sortable overview")
    return section(
        "Overview", search("cells", "Filter", "fine reap", "cells"), held, key="overview"
    )


def _overview_row(cell: Cell, status: bool, fields: Sequence[str]) -> list[Shown | str]:
    head = cell.head
    row: list[Shown | str] = [
        Shown(head["model"] or "?", cell.get("teacher", "granularity") or ""),
        Shown(head["compressor"] or "?", head["paradigm"] or ""),
    ]
    row += [status_of(cell)] if status else []
    row += [_chosen(head, name) for name in fields]
    row += [_size(cell, "teacher"), _size(cell, "compressed")]
    for stage in STAGES:
        perplexity = cell.get(stage, "perplexity")
        note = "" if perplexity is None else f"ppl {perplexity:,.2f}"
        value = cell.get(stage, "nll")
        row.append(Shown(plus_minus(value, cell.get(stage, "nll_se")), note, value))
    for stage in STAGES[1:]:
        kl, se = cell.get(stage, "kl"), cell.get(stage, "kl_se")
        row.append(Shown(plus_minus(kl, None), "" if se is None else f"± {se:.3f}", kl))
    recovery = cell.get("repaired", "recovery")
    said = share(recovery, cell.get("repaired", "recovery_se"))
    row.append(Shown(said, cell.no_recovery, recovery))
    row.append(Shown("" if cell.seconds is None else f"{cell.seconds:.0f}", sort=cell.seconds))
    return row


def _chosen(head: Row, name: str) -> Shown:
    value, note = budget_of(head) if name == "budget" else (shown(head, name), "")
    known = isinstance(value, int | float)
    return Shown(number(value), note, float(value) if known else None)


def _by_stage(cell: Cell, name: str) -> Shown:
    """Return a column once, or stage by stage where the stages differ; sorted by the last one."""
    values = [row[name] for row in cell.rows if row[name] is not None]
    if COLUMNS[name].kind is float:
        said = [f"{value:.4g}" for value in values]
    else:
        said = [f"{v:,}" if COLUMNS[name].kind is int else str(v) for v in values]
    last = values[-1] if values and isinstance(values[-1], int | float) else None
    return Shown(" → ".join(said if len(set(said)) > 1 else said[:1]), sort=last)


def _size(cell: Cell, stage: str) -> Shown:
    size, experts = cell.get(stage, "bytes"), cell.get(stage, "expert_bytes")
    note = "" if experts is None else f"experts {megabytes(experts)}"
    return Shown(megabytes(size), note, None if size is None else float(size))


def unfinished(cells: Sequence[Cell]) -> str:
    """Return the cells that failed or do not apply, with their reasons."""
    rows = [
        [name_of(cell), status_of(cell), cell.head["reason"] or "", cell.head["key"] or ""]
        for cell in cells
        if not cell.done
    ]
    if not rows:
        return ""
    columns = ["cell", "status", "reason", "key"]
    held = table("Cells without a result", columns, rows, class_="sortable")
    return section("Failed and not applicable", held, key="unfinished")


def problems(sentences: Sequence[str]) -> str:
    """Return what could not be read; empty where everything could."""
    if not sentences:
        return ""
    lead = text("p", "These were left untouched, and nothing of them is on this page.")
    items = tag("ul", "".join(text("li", one) for one in sentences))
    box = tag("div", lead + items, class_="warning")
    return section("Not read", box, key="problems")


def sizes(cells: Sequence[Cell]) -> str:
    """Return what each method leaves of a model, in the checkpoint, on disk, in memory, in use."""
    rows = [_size_row(cell) for cell in cells if cell.get("compressed", "bytes") is not None]
    rows = [[*row] for row in dict.fromkeys(map(tuple, rows))]  # seeds agree
    if not rows:
        return ""
    columns = ["cell", "experts removed", "model removed", "MB", "MB of experts", "MB on disk"]
    columns += ["MB in memory", "parameters active", "experts active"]
    caption = "Sizes after compression. MB and MB of experts in the checkpoint's dtype, as stored "
    caption += "by the form; on disk: the exported weights, blank without an export; in memory: as "
    caption += "scored; active: used for one token, experts a layer."
    held = table(caption, columns, rows, id="sizes-table", class_="sortable overview")
    return section("Sizes", fold_many(held, len(rows)), key="sizes")


def _size_row(cell: Cell) -> list[Shown | str]:
    removed = [cell.get("compressed", f"removed_of_{what}") for what in ("experts", "model")]
    head = cell.head
    row: list[Shown | str] = [f"{head['model'] or '?'}, {label_of(head, ['ratio'])}"]
    row += [Shown("" if one is None else percent(one), sort=one) for one in removed]
    for column in ("bytes", "expert_bytes", "disk_bytes", "memory_bytes"):
        known = [cell.get(stage, column) for stage in ("repaired", "compressed")]
        size = next((value for value in known if value is not None), None)
        row.append(Shown(megabytes(size), sort=size))
    active = cell.get("compressed", "active_parameters")
    row.append(Shown("" if active is None else f"{active:,}", sort=active))
    experts = cell.get("compressed", "active_experts")
    row.append(Shown("" if experts is None else f"{experts:.2f}", sort=experts))
    return row


def by_text(cells: Sequence[Cell]) -> str:
    """Return NLL for each held-out text on its own."""
    rows: list[list[Shown | str]] = []
    for cell in cells:
        for name in cell.get("teacher", "nll_by") or {}:
            held = [(cell.get(stage, "nll_by") or {}).get(name) or {} for stage in STAGES]
            row: list[Shown | str] = [name_of(cell), name]
            row += [
                Shown(plus_minus(one.get("nll"), one.get("se")), sort=one.get("nll"))
                for one in held
            ]
            found = held[2].get("recovery")
            row.append(Shown(share(found, held[2].get("recovery_se")), sort=found))
            row.append(f"{held[0].get('tokens') or 0:,}")
            rows.append(row)
    if not rows:
        return ""
    columns = ["cell", "text", *STAGES, "recovery", "tokens"]
    held_table = table("Held-out NLL by text", columns, rows, class_="sortable")
    return section("Each text on its own", folded(f"{len(rows)} rows", held_table), key="texts")


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
            rows.append([name_of(cell), task, metric, *numbers, count])
    if not rows:
        return ""
    columns = ["cell", "task", "metric", *STAGES, "documents"]
    caption = "lm-eval, each ± its standard error"
    return section("Tasks", table(caption, columns, rows, class_="sortable"), key="tasks")


def reproduce(cells: Sequence[Cell]) -> str:
    """Return the command, key, seed and revision of every cell."""
    rows: list[list[Shown | str]] = []
    for cell in cells:
        head = cell.head
        command = (head["choices"] or {}).get("command") or ""
        seed = "" if head["seed"] is None else str(head["seed"])
        rows.append([name_of(cell), command, head["key"] or "", seed, head["revision"] or ""])
    if not rows:
        return ""
    columns = ["cell", "command", "key", "seed", "revision"]
    held = table("How to get each cell again", columns, rows, id="commands", class_="commands")
    box = search("commands", "Filter", "reap", "commands")
    return section("Reproduce", fold_many(box + held, len(rows)), key="reproduce")


def fold_many(inner: str, count: int) -> str:
    """Return it folded where it has many rows."""
    return folded(f"{count} rows", inner) if count > FEW else inner


def status_of(cell: Cell) -> str:
    """Return the status in words."""
    return str(cell.head["status"]).replace("_", " ")


def name_of(cell: Cell) -> str:
    """Return a short name of a cell."""
    head = cell.head
    parts = [head["model"] or "?", label_of(head, ["ratio", "samples"])]
    return ", ".join(parts) + ("" if head["seed"] is None else f", seed {head['seed']}")


def prompt_of(cell: Cell) -> str:
    """Return the prompt as a quotation."""
    return tag("p", "Prompt: " + tag("q", escaped(cell.head["prompt"])), class_="soft")
