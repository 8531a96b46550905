"""What a person sees at the end: table, comparison, continuations, and the report's path."""

from pathlib import Path

from rerail.report.folders import below, unstarted
from rerail.report.report import write_report
from rerail.report.terminal import print_summary
from rerail.run.results import gather, log, write_csv


def finish(out: Path, title: str = "rerail") -> Path:
    """Read every row below `out`, print them, and write results.csv and report.html there."""
    rows, problems = gather(out)
    for sentence in problems:
        log.warning("%s", sentence)
    write_csv(out / "results.csv", rows)
    path = out / "report.html"
    write_report(rows, path, title, below(out, [*problems, *unstarted(out)]))
    print_summary(rows)
    print(f"report: {path}")
    return path
