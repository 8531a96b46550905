"""The summary that a run ends with: a table, one comparison, and the same prompt continued."""

import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rerail.report.cells import STAGES, Cell, by_tokens, cells_of, settings_of, tokens_label
from rerail.report.comparison import comparison
from rerail.report.labels import budget_of, columns_of, label_of, shown
from rerail.report.words import megabytes, number, plus_minus, share
from rerail.run.results import Row

PIPED = 160  # columns where there is no terminal


def print_summary(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print what the rows say; without a terminal plain text of `PIPED` columns."""
    if console is None:
        bare = not sys.stdout.isatty()
        console = Console(
            width=PIPED if bare else None,
            force_terminal=False if bare else None,
        )
    cells = cells_of(rows)
    settings = settings_of(cells)
    done = [cell for cell in cells if cell.done]
    if done:
        console.print(_table(done))
        for group in by_tokens(settings).values():
            console.print(Text(f"held-out text: {tokens_label(group[0].head)}"), style="dim")
    if len(by_tokens(settings)) > 1:
        console.print("Rows of different held-out tokens cannot be compared with each other.")
    for cell in cells:
        if not cell.done:
            console.print(_unfinished(cell))
    if compared := comparison(settings):
        console.print(Text(compared, style="bold"))
    _print_continuations(console, done)


def _table(cells: Sequence[Cell]) -> Table:
    fields = columns_of(cells)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("model", "method", *fields):
        table.add_column(name, overflow="fold")
    table.add_column("MB", justify="right")
    for stage in STAGES:
        table.add_column(f"NLL {stage}\nperplexity", justify="right")
    for name in ("KL to teacher", "recovery", "seconds"):
        table.add_column(name, justify="right")
    for cell in cells:
        table.add_row(*(Text(value) for value in _fields(cell, fields)))
    return table


def _fields(cell: Cell, fields: Sequence[str]) -> list[str]:
    head = cell.head
    plain = [str(head[n] if head[n] is not None else "") for n in ("model", "compressor")]
    plain += [_chosen(head, name) for name in fields]
    sizes = [megabytes(cell.get(stage, "bytes")) for stage in STAGES[:2]]
    values = [" → ".join(size for size in sizes if size)]
    for stage in STAGES:
        nll = plus_minus(cell.get(stage, "nll"), cell.get(stage, "nll_se"))
        perplexity = cell.get(stage, "perplexity")
        values.append(nll + ("" if perplexity is None else f"\n{perplexity:.2f}"))
    kls = [cell.get(stage, "kl") for stage in STAGES[1:]]
    values.append(" → ".join(f"{kl:.3f}" for kl in kls if kl is not None))
    recovery = share(cell.get("repaired", "recovery"), cell.get("repaired", "recovery_se"))
    values.append(recovery or cell.no_recovery)
    values.append("" if cell.seconds is None else f"{cell.seconds:.0f}")
    return plain + values


def _chosen(head: Row, name: str) -> str:
    if name != "budget":
        return number(shown(head, name))
    value, said = budget_of(head)
    return f"{number(value)} {said}".strip()


def _unfinished(cell: Cell) -> Text:
    head = cell.head
    name = f"{head['model'] or '?'}, {label_of(head, ['ratio', 'samples'])}"
    line = Text(f"{head['status'].replace('_', ' ')}: ", style="red")
    reason = " ".join((head["reason"] or "no reason given").split())
    return line.append(f"{name}: {reason}", style="default")


def _print_continuations(console: Console, cells: Sequence[Cell]) -> None:
    """Print the prompt and what came after it, for the first cell of each model."""
    shown = set()
    for cell in cells:
        model = cell.head["model"]
        if model in shown or not cell.get("repaired", "samples_text"):
            continue
        shown.add(model)
        console.print()
        name = f"{model}, {label_of(cell.head, ['ratio'])}: "
        console.print(Text(name).append(cell.head["prompt"] or "", style="bold"))
        for stage in STAGES:
            words = " ".join((cell.get(stage, "samples_text") or "").split())
            console.print(Text(f"  {stage:<11}", style="dim").append(f"... {words}", style="none"))
