"""The summary that a run ends with: a table, one comparison, and the same prompt continued."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rerail.printable import printable
from rerail.report.cells import Cell, Fields
from rerail.report.comparison import comparison
from rerail.report.frame import Results, columns_of
from rerail.report.words import form, megabytes, plus_minus, share
from rerail.run.results import STAGES
from rerail.run.settings import number, tokens_label

PIPED = 160  # columns where there is no terminal


def print_summary(rows: Sequence[Fields], console: Console | None = None) -> None:
    """Print what the rows say; without a terminal plain text of `PIPED` columns."""
    if console is None:
        piped: dict[str, Any] = {"width": PIPED, "force_terminal": False}
        console = Console(**({} if sys.stdout.isatty() else piped))
    results = Results.of(printable(rows))  # rows may be a stranger's
    texts = results.settings.drop_duplicates("tokens")["head"]
    if results.done:
        console.print(_table(results.done))
    for head in texts:
        console.print(Text(f"held-out text: {tokens_label(head)}"), style="dim")
    if len(texts) > 1:
        console.print("Rows of different held-out tokens cannot be compared with each other.")
    for cell in results.cells:
        if not cell.done:
            console.print(_unfinished(cell))
    if compared := comparison(results):
        console.print(Text(compared, style="bold"))
    _print_continuations(console, results.done)


def _table(cells: Sequence[Cell]) -> Table:
    fields = columns_of(cells)
    rows = [_fields(cell, fields) for cell in cells]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in rows[0]:
        if name in ("model", "method", *fields):
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table


def _fields(cell: Cell, fields: Sequence[str]) -> dict[str, str]:
    """Return the fields of a row by their headings."""
    sizes = [megabytes(cell.get(stage, "bytes")) for stage in STAGES[:2]]
    kls = [form(cell.get(stage, "kl"), "{:.3f}") for stage in STAGES[1:]]
    recovery = share(cell.get("repaired", "recovery"), cell.get("repaired", "recovery_se"))
    losses = {}
    for stage in STAGES:
        nll = plus_minus(cell.get(stage, "nll"), cell.get(stage, "nll_se"))
        perplexity = form(cell.get(stage, "perplexity"), "\n{:.2f}")
        losses[f"NLL {stage}\nperplexity"] = nll + perplexity
    choices = {name: cell.choice(name) for name in fields}
    return {
        "model": cell.head["model"] or "",
        "method": cell.head["compressor"] or "",
        **{name: f"{number(value)} {unit}".strip() for name, (value, unit) in choices.items()},
        "MB": " → ".join(filter(None, sizes)),
        **losses,
        "KL to teacher": " → ".join(filter(None, kls)),
        "recovery": recovery or cell.no_recovery,
        "seconds": form(cell.seconds, "{:.0f}"),
    }


def _unfinished(cell: Cell) -> Text:
    line = Text(f"{cell.status}: ", style="red")
    reason = " ".join((cell.head["reason"] or "no reason given").split())
    return line.append(f"{cell.name()}: {reason}", style="default")


def _print_continuations(console: Console, cells: Sequence[Cell]) -> None:
    """Print the prompt and what came after it, for the first cell of each model."""
    printed = set()
    for cell in cells:
        model = cell.head["model"]
        if model in printed or not cell.get("repaired", "samples_text"):
            continue
        printed.add(model)
        console.print()
        prompt = cell.head["prompt"] or ""
        console.print(Text(f"{cell.name(['ratio'])}: ").append(prompt, style="bold"))
        for stage in STAGES:
            words = " ".join((cell.get(stage, "samples_text") or "").split())
            console.print(Text(f"  {stage:<11}", style="dim").append(f"... {words}", style="none"))
