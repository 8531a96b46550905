"""The cells of a sweep on the screen."""

import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rerail.printable import printable
from rerail.sweep.states import STATES, CellState, View

PIPED = 200  # columns where there is no terminal
EVERY = 2.0  # seconds between two looks
LOOKS = 3  # looks after which what is lost is believed: a file may show late on a shared disk

_COLOUR = {
    "pending": "dim",
    "running": "cyan",
    "done": "green",
    "not_applicable": "dim",
    "failed": "red",
    "lost": "red",
    "unreadable": "yellow",
}


def console() -> Console:
    """Return standard output; without a terminal it is wide and plain."""
    bare = not sys.stdout.isatty()
    return Console(width=PIPED if bare else None, force_terminal=False if bare else None)


def counts(view: View) -> str:
    """Return `5 done, 1 failed, 2 pending`."""
    number = Counter(cell.state for cell in view.cells)
    parts = [f"{number[state]} {state.replace('_', ' ')}" for state in STATES if number[state]]
    return ", ".join(parts) or "no cells"


def rendered(view: View) -> Group:
    """Return the table, what could not be read, and the counts."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("cell", "state", "what", "job"):
        table.add_column(name, overflow="fold")
    table.add_column("last heard", justify="right", no_wrap=True)
    for cell in view.cells:
        state = Text(cell.state.replace("_", " "), _COLOUR[cell.state])
        words = Text(str(printable(cell.folder))), state, Text(cell.detail), Text(cell.job)
        table.add_row(*words, _ago(cell.seconds))
    notes = [Text(f"note: {note}", "yellow") for note in view.notes]
    return Group(*([table] if view.cells else []), *notes, Text(counts(view)))


def _ago(seconds: float | None) -> str:
    return "" if seconds is None else f"{timedelta(seconds=round(max(0.0, seconds)))}"


def watch(look: Callable[[], View], screen: Console | None = None, every: float = EVERY) -> View:
    """Show the cells until none is pending or running, and return how they stand.

    Without a terminal every change of a state is a line.
    """
    screen = screen or console()
    if not screen.is_terminal:
        return _lines(look, screen, every)
    with Live(console=screen, auto_refresh=False) as live:
        return _until_over(look, lambda view: live.update(rendered(view), refresh=True), every)


def _lines(look: Callable[[], View], screen: Console, every: float) -> View:
    seen: dict[str, str] = {}

    def show(view: View) -> None:
        for cell in view.cells:
            if seen.get(cell.folder) != cell.state:
                seen[cell.folder] = cell.state
                screen.print(_line(cell), highlight=False, markup=False, soft_wrap=True)

    view = _until_over(look, show, every)
    screen.print(counts(view), highlight=False)
    return view


def _line(cell: CellState) -> str:
    job = f" (job {cell.job})" if cell.job else ""
    detail = f": {cell.detail}" if cell.detail else ""
    name = printable(cell.folder)
    return f"{time.strftime('%H:%M:%S')} {name}{job} {cell.state}{detail}"


def _until_over(look: Callable[[], View], show: Callable[[View], None], every: float) -> View:
    doubts = 0
    while True:
        view = look()
        show(view)
        lost = any(cell.state == "lost" for cell in view.cells)
        doubts = 0 if view.open else doubts + 1
        if not view.open and (not lost or doubts >= LOOKS):
            return view
        time.sleep(every)
