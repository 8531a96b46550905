"""`rerail-report`: one self-contained page of all results below a folder."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rerail.config.secrets import guard_streams
from rerail.errors import InputError
from rerail.files import is_folder
from rerail.printable import printable


def main(words: Sequence[str] | None = None) -> None:
    """Entry point: exit status 0, or 2 where an argument cannot be used or nothing is there."""
    guard_streams()
    parser = argparse.ArgumentParser(prog="rerail-report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds result.json files, or one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: DIR/report.html")
    parser.add_argument("--title", help="heading of the page; default: the folder's name")
    parser.add_argument(
        "--columns", default="", metavar="NAME,NAME", help="further columns of the overview"
    )
    arguments = parser.parse_args(words)
    try:
        path, problems = _write(arguments)
    except InputError as error:
        sys.stderr.write(f"rerail-report: {error}\n")
        sys.exit(2)
    for sentence in problems:
        sys.stderr.write(f"rerail-report: {sentence}\n")
    print(f"report: {path}")


def _write(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """Write the page; return its path and a sentence on each file that is not on it."""
    from rerail.cli.screen import unstarted, write_page
    from rerail.report.report import check_columns
    from rerail.run.results import gather

    columns = [name.strip() for name in arguments.columns.split(",") if name.strip()]
    check_columns(columns)
    folder = arguments.folder
    rows, problems = gather(folder)
    problems += unstarted(folder)
    if not rows:
        raise InputError(_why_empty(folder, problems))
    path = arguments.out or (folder if is_folder(folder) else folder.parent) / "report.html"
    if is_folder(path):
        raise InputError(f"--out {path} is a folder; give the name of a file")
    title = arguments.title or folder.absolute().name
    return write_page(rows, folder, path, title, problems, columns), problems


def _why_empty(folder: Path, problems: Sequence[str]) -> str:
    """Return why there is no page: what was looked for, and what is there instead."""
    there: list[str] = []
    with contextlib.suppress(OSError):  # then the first problem says so
        there = sorted(printable(p.name) for p in folder.iterdir() if not p.name.startswith("."))
    names = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    first = f"; {len(problems)} could not be read, the first: {problems[0]}" if problems else ""
    return f"{folder} has no result rows (it holds {names or 'nothing'}){first}"


if __name__ == "__main__":
    main()
