"""`rerail-sweep`: look at a sweep, stop it, or gather what it has found."""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from rerail.config.secrets import guard_streams
from rerail.errors import InputError
from rerail.printable import printable
from rerail.processes import running_process
from rerail.sweep import queue, table
from rerail.sweep.folder import Sweep, sweeps_of
from rerail.sweep.states import look, status_of

CODES = "exit status: 0 all done, 1 something failed or was lost, 3 something waits or runs"


def main(words: Sequence[str] | None = None) -> None:
    """Entry point; exit status 2 where an argument cannot be used."""
    guard_streams()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = _parser().parse_args(words)
    try:
        code = int(options.action(options))
    except InputError as error:
        sys.stderr.write(f"rerail-sweep: {error}\n")
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rerail-sweep", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, action, text in (
        ("status", status, "show every cell: pending, running, done, failed or lost"),
        ("cancel", cancel, "cancel the jobs and stop the processes of the sweeps in OUT"),
        ("collect", collect, "write results.csv and report.html from the rows that are there"),
    ):
        command = actions.add_parser(name, help=text, description=text, epilog=CODES)
        command.add_argument("out", nargs="?", type=Path, default=Path("outputs"), metavar="OUT")
        command.set_defaults(action=action)
        if name == "status":
            command.add_argument("--watch", action="store_true", help="until nothing waits or runs")
            command.add_argument("--exit-code", action="store_true", help=CODES)
    return parser


def status(options: argparse.Namespace) -> int:
    """Show the cells once or until the sweep is over."""
    out = options.out.absolute()
    screen = table.console()
    if options.watch:
        view = table.watch(lambda: look(out), screen)
    else:
        view = look(out)
        screen.print(table.rendered(view), highlight=False)
    return view.exit_code if options.exit_code else 0


def cancel(options: argparse.Namespace) -> int:
    """Cancel what waits or runs: the jobs of the sweeps in OUT, and processes on this host."""
    out = options.out.absolute()
    view = look(out)
    notes: list[str] = list(view.notes)
    sweeps = list(sweeps_of(out, notes))
    jobs = [job for sweep in sweeps for job in _cancelled(sweep)]
    started = [sweep.process for sweep in sweeps if sweep.executor == "here"]
    started += [status_of(out / c.folder) for c in view.cells if c.state == "running" and not c.job]
    processes = {p.pid: p for status in started if (p := running_process(status))}
    stopped = [pid for pid, process in processes.items() if _stop(process, notes)]
    for note in dict.fromkeys(notes):
        sys.stderr.write(f"rerail-sweep: {printable(note)}\n")
    sentences = [f"cancelled {len(jobs)} jobs ({', '.join(jobs)})"] if jobs else []
    sentences += [f"stopped process {pid}" for pid in stopped]
    table.console().print("; ".join(sentences) or "nothing waits or runs here", highlight=False)
    return 0


def _stop(process: psutil.Process, notes: list[str]) -> bool:
    """Stop a process if it is one of ours; whether it was asked to stop.

    Host, number and start time come from a file that anybody may have written, and any process has
    such: what it runs is asked of the system.
    """
    try:
        if not is_rerail(process.cmdline()):
            notes.append(
                f"process {process.pid} is named as one of this sweep, but its command is not "
                f"rerail's; it was left alone: see `ps {process.pid}`, and stop it by hand"
            )
            return False
        process.terminate()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        notes.append(f"process {process.pid} is another user's; it was left alone")
        return False
    return True


def is_rerail(command: Sequence[str]) -> bool:
    """Return whether a command line is that of rerail: its script, or `python -m rerail`."""
    words = list(command)
    if words and re.fullmatch(r"(python|pypy)[0-9.]*", Path(words[0]).name.lower()):
        words.pop(0)
        while (
            words
            and re.fullmatch(r"-[a-zA-Z]+|--[a-z-]+", words[0])
            and words[0] not in ("-m", "-c")
        ):
            # what follows these is their value
            del words[: 2 if words[0] in ("-X", "-W", "--check-hash-based-pycs") else 1]
    if words[:1] == ["-m"]:
        return any(word.split(".")[0] == "rerail" for word in words[1:2])
    return any(Path(word).name == "rerail" for word in words[:1])


def _cancelled(sweep: Sweep) -> list[str]:
    """Cancel the jobs of a sweep that wait or run, and return them."""
    if not sweep.jobs:
        return []
    # the numbers come from a file that anybody may have written: only jobs of this sweep's name
    states = queue.active(sweep.jobs.values(), sweep.cluster, sweep.path.name)
    jobs = sorted(states or {})
    if states is None or (jobs and not queue.cancel(jobs, sweep.cluster)):
        raise InputError(f"Slurm does not answer here; the jobs of {sweep.path} were not cancelled")
    return jobs


def collect(options: argparse.Namespace) -> int:
    """Write results.csv and report.html, and print the summary."""
    from rerail.cli.screen import finish

    out = options.out.absolute()
    view = look(out)
    finish(out)
    table.console().print(table.counts(view), highlight=False)
    return view.exit_code


if __name__ == "__main__":
    main()
