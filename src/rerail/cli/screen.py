"""What a person sees at the end: table, comparison, continuations, and the report's path."""

import os
from collections.abc import Sequence
from pathlib import Path

from rerail.config.secrets import redacted
from rerail.errors import InputError
from rerail.files import is_folder, read_json
from rerail.printable import printable
from rerail.report.report import write_report
from rerail.report.terminal import print_summary
from rerail.run.results import RESULT, Row, files_named, gather, log, validate_row, write_csv


def finish(out: Path, title: str = "rerail") -> Path:
    """Read every row below `out`, print them, and write results.csv and report.html there."""
    rows, problems = gather(out)
    rows = _redacted(rows)
    for sentence in problems:
        log.warning("%s", sentence)
    write_csv(out / "results.csv", rows)
    path = write_page(rows, out, out / "report.html", title, [*problems, *unstarted(out)])
    print_summary(rows)
    print(f"report: {path}")
    return path


def write_page(
    rows: Sequence[Row],
    folder: Path,
    path: Path,
    title: str,
    problems: Sequence[str],
    columns: Sequence[str] = (),
) -> Path:
    """Write a page that others will see: it names files from `folder` on."""
    sentences = [sentence.replace(f"{folder}/", "") for sentence in problems]
    return write_report(_redacted(rows), path, title, sentences, columns)


def _redacted(rows: Sequence[Row]) -> list[Row]:
    """Return rows without secrets: also those of others, before anything escapes them."""
    clean = ((row, redacted(plain := dict(row)), plain) for row in rows)
    return [row if shown is plain else validate_row(shown) for row, shown, plain in clean]


def unstarted(folder: Path) -> list[str]:
    """Return a sentence on each cell below a folder that has a status file, but no rows yet."""
    sentences = []
    for file in files_named("status.json", folder)[0] if is_folder(folder) else ():
        if os.path.lexists(file.parent / RESULT):
            continue
        try:
            status = read_json(file)
            state = " ".join(str(status[name] or "") for name in ("state", "stage")).strip()
        except (InputError, KeyError, TypeError) as error:
            state = f"unreadable ({type(error.__cause__ or error).__name__})"
        sentences.append(f"{file.parent} has no rows yet; its status is: {state}")
    return [str(printable(sentence)) for sentence in sentences]
