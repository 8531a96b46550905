"""The tables of the report: cells, sizes, what did not finish, and how to get each cell again."""

from collections.abc import Mapping, Sequence
from typing import Any

from rerail.report.cells import Cell
from rerail.report.frame import Results, columns_of, varying
from rerail.report.page import Field, Folded, Section, Table, Warned, Words
from rerail.report.words import interval, megabytes, percent, plus_minus, share
from rerail.run.results import COLUMNS, STAGES
from rerail.run.settings import budget_of, label_of, number, shown, tokens_of

Fields = list[Field | str]


def measured(value: Any, error: Any = None, note: str = "") -> Field:
    """Return a number with its error."""
    return Field(plus_minus(value, error), note, value)


def recovered(value: Any, error: Any = None, note: str = "") -> Field:
    """Return a recovery with its error."""
    return Field(share(value, error), note, value)


def overview(cells: Sequence[Cell], further: Sequence[str] = ()) -> Section:
    """Return the table of all cells, also those that are not done.

    Args:
        cells: of all rows.
        further: names of columns that are added.
    """
    if not cells:
        empty = Words("p", "There are no result rows yet.")
        return Section("overview", "Overview", [empty])
    fields = columns_of(cells)
    sets = list(dict.fromkeys(tokens_of(cell.head) for cell in cells if cell.done))
    status = [] if all(cell.done for cell in cells) else ["status"]
    columns = ["model", "method", *status, *fields, "MB before", "MB after"]
    columns += [f"NLL {stage}" for stage in STAGES]
    columns += ["KL compressed", "KL repaired", "recovery", "seconds"]
    columns += ["held-out text"] if len(sets) > 1 else []
    columns += [name.replace("_", " ") for name in further]
    rows = []
    for cell in cells:
        row = _overview_row(cell, bool(status), fields)
        if len(sets) > 1:
            row.append(f"set {sets.index(tokens_of(cell.head)) + 1}" if cell.done else "")
        rows.append(row + [_by_stage(cell, name) for name in further])
    caption = (
        "One row a cell. NLL and KL in nats a token, each ± its standard error; MB are 10^6 bytes "
        "of the whole model in the checkpoint's dtype; ppl is the perplexity exp(NLL); seconds are "
        "those of all stages."
    )
    find = ("fine reap", "cells")
    table = Table(caption, columns, rows, "sortable overview", "cells", find)
    return Section("overview", "Overview", [table])


def _overview_row(cell: Cell, status: bool, fields: Sequence[str]) -> Fields:
    head = cell.head
    row: Fields = [
        Field(head["model"] or "?", cell.get("teacher", "granularity") or ""),
        Field(head["compressor"] or "?", head["paradigm"] or ""),
    ]
    row += [cell.status] if status else []
    row += [_choice(head, name) for name in fields]
    row += [_size(cell, "teacher"), _size(cell, "compressed")]
    for stage in STAGES:
        perplexity = cell.get(stage, "perplexity")
        note = "" if perplexity is None else f"ppl {perplexity:,.2f}"
        row.append(measured(cell.get(stage, "nll"), cell.get(stage, "nll_se"), note))
    for stage in STAGES[1:]:
        se = cell.get(stage, "kl_se")
        row.append(measured(cell.get(stage, "kl"), note="" if se is None else f"± {se:.3f}"))
    recovery, error = (cell.get("repaired", name) for name in ("recovery", "recovery_se"))
    seconds = "" if cell.seconds is None else f"{cell.seconds:.0f}"
    return [*row, recovered(recovery, error, cell.no_recovery), Field(seconds, sort=cell.seconds)]


def _choice(head: Mapping[str, Any], name: str) -> Field:
    value, note = budget_of(head) if name == "budget" else (shown(head, name), "")
    known = isinstance(value, int | float)
    return Field(number(value), note, float(value) if known else None)


def _by_stage(cell: Cell, name: str) -> Field:
    """Return a column once, or stage by stage where the stages differ; sorted by the last one."""
    values = [row[name] for row in cell.rows if row[name] is not None]
    formats: Mapping[type, str] = {float: "{:.4g}", int: "{:,}"}
    words = [formats.get(COLUMNS[name].kind, "{}").format(value) for value in values]
    last = values[-1] if values and isinstance(values[-1], int | float) else None
    return Field(" → ".join(words if len(set(words)) > 1 else words[:1]), sort=last)


def _size(cell: Cell, stage: str) -> Field:
    size, experts = cell.get(stage, "bytes"), cell.get(stage, "expert_bytes")
    note = "" if experts is None else f"experts {megabytes(experts)}"
    return Field(megabytes(size), note, None if size is None else float(size))


def unfinished(cells: Sequence[Cell]) -> Section:
    """Return the cells that failed or do not apply, with their reasons."""
    rows = [
        [cell.full_name, cell.status, cell.head["reason"] or "", cell.head["key"] or ""]
        for cell in cells
        if not cell.done
    ]
    table = Table("Cells without a result", ["cell", "status", "reason", "key"], rows)
    return Section("unfinished", "Failed and not applicable", [table] if rows else [])


def problems(sentences: Sequence[str]) -> Section:
    """Return what could not be read."""
    warned = Warned("These were left untouched, and nothing of them is on this page.", sentences)
    return Section("problems", "Not read", [warned] if sentences else [])


def sizes(cells: Sequence[Cell]) -> Section:
    """Return what each method leaves of a model, in the checkpoint, on disk, in memory, in use."""
    rows = [_size_row(cell) for cell in cells if cell.get("compressed", "bytes") is not None]
    rows = [list(row) for row in dict.fromkeys(map(tuple, rows))]  # seeds agree
    columns = ["cell", "experts removed", "model removed", "MB", "MB of experts", "MB on disk"]
    columns += ["MB in memory", "parameters active", "experts active"]
    caption = "Sizes after compression. MB and MB of experts in the checkpoint's dtype, as stored "
    caption += "by the form; on disk: the exported weights, blank without an export; in memory: as "
    caption += "scored; active: used for one token, experts a layer."
    table = Table(caption, columns, rows, "sortable overview", "sizes-table", foldable=True)
    return Section("sizes", "Sizes", [table] if rows else [])


def _size_row(cell: Cell) -> Fields:
    row: Fields = [cell.name(["ratio"])]
    for name in ("removed_of_experts", "removed_of_model"):
        removed = cell.get("compressed", name)
        row.append(recovered(removed))
    for column in ("bytes", "expert_bytes", "disk_bytes", "memory_bytes"):
        known = [cell.get(stage, column) for stage in ("repaired", "compressed")]
        size = next((value for value in known if value is not None), None)
        row.append(Field(megabytes(size), sort=size))
    for column, form in (("active_parameters", "{:,}"), ("active_experts", "{:.2f}")):
        active = cell.get("compressed", column)
        row.append(Field("" if active is None else form.format(active), sort=active))
    return row


def by_text(cells: Sequence[Cell]) -> Section:
    """Return NLL for each held-out text on its own."""
    rows: list[Fields] = []
    for cell in cells:
        for name in cell.get("teacher", "nll_by") or {}:
            scores = [(cell.get(stage, "nll_by") or {}).get(name) or {} for stage in STAGES]
            row: Fields = [cell.full_name, name]
            row += [measured(score.get("nll"), score.get("se")) for score in scores]
            row.append(recovered(scores[2].get("recovery"), scores[2].get("recovery_se")))
            rows.append([*row, f"{scores[0].get('tokens') or 0:,}"])
    columns = ["cell", "text", *STAGES, "recovery", "tokens"]
    table = Table("Held-out NLL by text", columns, rows)
    folded = Folded(f"{len(rows)} rows", [table])
    return Section("texts", "Each text on its own", [folded] if rows else [])


def benchmarks(cells: Sequence[Cell]) -> Section:
    """Return the scores of lm-eval, where it was asked."""
    rows: list[Fields] = []
    for cell in cells:
        scores: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for stage in STAGES:
            for score in cell.get(stage, "tasks") or []:
                scores.setdefault((score["task"], score["metric"]), {})[stage] = score
        for (task, metric), known in scores.items():
            each = [known.get(stage, {}) for stage in STAGES]
            numbers = [measured(score.get("value"), score.get("se")) for score in each]
            count = next(str(score["n"]) for score in each if score)
            rows.append([cell.full_name, task, metric, *numbers, count])
    columns = ["cell", "task", "metric", *STAGES, "documents"]
    table = Table("lm-eval, each ± its standard error", columns, rows)
    return Section("tasks", "Tasks", [table] if rows else [])


def reproduce(cells: Sequence[Cell]) -> Section:
    """Return the command, key, seed and revision of every cell."""
    rows: list[Fields] = []
    for cell in cells:
        head = cell.head
        command = (head["choices"] or {}).get("command") or ""
        seed = "" if head["seed"] is None else str(head["seed"])
        rows.append([cell.full_name, command, head["key"] or "", seed, head["revision"] or ""])
    columns = ["cell", "command", "key", "seed", "revision"]
    caption, find = "How to get each cell again", ("reap", "commands")
    table = Table(caption, columns, rows, "commands", "commands", find, foldable=True)
    return Section("reproduce", "Reproduce", [table] if rows else [])


def means(results: Results) -> list[Table]:
    """Return a table of means over seeds; nothing where no setting has several."""
    settings = results.settings
    several = settings[settings["cells"].map(len) > 1]
    fields = list(dict.fromkeys(["ratio", *varying(settings)]))
    asked = (
        ("compressed", "nll"),
        ("repaired", "nll"),
        ("repaired", "kl"),
        ("repaired", "recovery"),
    )
    estimates = [results.estimate(several, measure, stage).itertuples() for stage, measure in asked]
    rows: list[Fields] = []
    for setting, *losses, recovery in zip(several.itertuples(), *estimates, strict=True):
        row: Fields = [setting.model, label_of(setting.head, fields)]
        row += [measured(loss.value, loss.error) if loss.n else "" for loss in losses]
        known = recovered(recovery.value, recovery.error) if recovery.n else setting.blank
        row += [known, interval(recovery.value, recovery.half)]
        rows.append([*row, f"{recovery.n} of {len(setting.cells)}"])
    columns = ["model", "setting", "NLL compressed", "NLL repaired", "KL repaired", "recovery"]
    caption = "Mean ± standard deviation over seeds, and the 95 % interval of the mean recovery by "
    caption += "Student's t; n counts the seeds that have a recovery."
    return [Table(caption, [*columns, "95 % interval", "n"], rows)] if rows else []


def differences(results: Results) -> list[Table]:
    """Return a table of fine minus coarse; nothing without a pair."""
    settings = results.settings
    gaps = results.differences(results.pairs(settings))
    fields = varying(settings.loc[[*gaps["fine"], *gaps["coarse"]]])
    rows: list[Fields] = []
    for gap in gaps.itertuples():
        fine, coarse = settings.loc[gap.fine], settings.loc[gap.coarse]
        row: Fields = [label_of(fine["head"], fields), f"{fine['model']} - {coarse['model']}"]
        for side in (gap.fine, gap.coarse):
            recovery = results.estimates.loc[(side, "repaired", "", "recovery")]
            row.append(recovered(recovery["value"], recovery["error"]))
        row.append(Field(percent(gap.value), sort=gap.value))
        decided = abs(gap.value) > gap.half  # False where the interval is unknown
        verdict = ("fine" if gap.value > 0 else "coarse") if decided else "undecided"
        rows.append([*row, interval(gap.value, gap.half), verdict, str(gap.n)])
    caption = "Recovery of the fine model minus that of the coarse one in points, with its 95 % "
    caption += "interval: paired seed by seed, by Student's t; with one seed (n = 1) from the "
    caption += "standard errors of both, as if they were independent, so without what other seeds "
    caption += "would change. The intervals are not adjusted for the number of rows."
    columns = ["setting", "models", "fine", "coarse", "fine - coarse", "95 % interval", "more", "n"]
    return [Table(caption, columns, rows, foldable=True)] if rows else []
