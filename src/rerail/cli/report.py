"""`rerail-report`: one self-contained page of all results below a folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rerail.errors import InputError


def main(words: Sequence[str] | None = None) -> None:
    """Entry point: exit status 0, or 2 where an argument cannot be used or nothing is there."""
    parser = argparse.ArgumentParser(prog="rerail-report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds result.json files, or one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: DIR/report.html")
    parser.add_argument("--title", help="heading of the page; default: the folder's name")
    parser.add_argument(
        "--columns", default="", metavar="NAME,NAME", help="further columns of the overview"
    )
    given = parser.parse_args(words)
    try:
        path, said = _made(given)
    except InputError as error:
        sys.stderr.write(f"rerail-report: {error}\n")
        sys.exit(2)
    for sentence in said:
        sys.stderr.write(f"rerail-report: {sentence}\n")
    print(f"report: {path}")


def _made(given: argparse.Namespace) -> tuple[Path, list[str]]:
    from rerail.report.folders import below, unstarted
    from rerail.report.report import check_columns, write_report
    from rerail.run.results import gather

    columns = [name.strip() for name in given.columns.split(",") if name.strip()]
    check_columns(columns)
    folder = given.folder
    rows, said = gather(folder)
    said += unstarted(folder)
    if not rows:
        raise InputError(_nothing(given.folder, said))
    out = given.out or (folder if folder.is_dir() else folder.parent) / "report.html"
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give the name of a file")
    title = given.title or folder.absolute().name
    return write_report(rows, out, title, below(folder, said), columns), said


def _nothing(folder: Path, said: Sequence[str]) -> str:
    """Return why there is no page: what was looked for, and what is there instead."""
    there = (
        sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if folder.is_dir()
        else []
    )
    names = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    unread = f"; {len(said)} could not be read, the first: {said[0]}" if said else ""
    return f"{folder} has no result rows (it holds {names or 'nothing'}){unread}"


if __name__ == "__main__":
    main()
