"""What Hydra, a sweep or a Slurm job calls: one cell from its composed config.

Nothing heavy is imported until it is called, and a job finds every function by its name.
"""

import dataclasses
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rerail.config.secrets import guard_streams, redacted
from rerail.errors import InputError
from rerail.files import read_text, refusals
from rerail.parallel import is_first


class Outcome:
    """What happened so far in this process: for the exit status, and for the summary at the end."""

    started = False
    failed = False
    out: Path | None = None


@dataclass(frozen=True)
class SweepCell:
    """A cell of a sweep before it runs: resolved and checked, plain and without secrets.

    Attributes:
        out: the folder of all cells, absolute.
        folder: of this cell, a name below `out`.
        key: hash of its choices.
        command: that runs this cell alone.
        names: the name that was chosen in each group.
        config: every resolved choice; a secret is the name of its variable.
        state: `open`, `done`, or why it cannot run: `failed` or `not_applicable`.
        reason: a sentence where it cannot run.
    """

    out: str
    folder: str
    key: str
    command: str
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    state: str = "open"
    reason: str = ""

    def save(self, path: Path) -> Path:
        """Write a file that a job reads, and return its path."""
        text = yaml.safe_dump(redacted(dataclasses.asdict(self)), sort_keys=False)
        with refusals(path):
            path.write_text(text, encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> "SweepCell":
        """Read what `save` wrote.

        Raises:
            InputError: it is something else.
        """
        try:
            return cls(**yaml.safe_load(read_text(path)))
        except (TypeError, yaml.YAMLError, RecursionError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} is no cell of a sweep ({reason})") from error


def _speaks() -> bool:
    """Return whether this process is the one that writes to the user."""
    try:
        return is_first()
    except InputError:  # its rank cannot be read, which is what it has to say
        return True


def record(out: Path | None, failed: bool) -> None:
    """Note what the summary at the end is of, and whether something failed."""
    if _speaks():
        Outcome.out = out or Outcome.out
    Outcome.failed = Outcome.failed or failed


def complain(sentence: str) -> None:
    """Write to the user what is wrong."""
    if _speaks():
        sys.stderr.write(f"rerail: {sentence}\n")


def set_up_logging() -> None:
    """Choose what a person wants to see: our own lines and the progress bars."""
    guard_streams()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("rerail").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module=r"lightning\.")


def task(config: Any) -> None:
    """Run the one cell of `rerail` without `-m`; a value that cannot be used is a sentence."""
    Outcome.started = True
    from hydra.core.hydra_config import HydraConfig

    from rerail.config.instantiate import build, resolved
    from rerail.run.compose import to_cell
    from rerail.run.pipeline import run_cell

    try:
        _check_single(HydraConfig.get())
        names, command = _chosen(HydraConfig.get())
        out = Path(resolved(config, "config")["out"]).absolute()
        cell = to_cell(config, command, names)
        run_cell(cell, out, build(config.logger, "logger"))
    except InputError as error:
        complain(str(error))
        record(None, failed=True)
        return
    record(out, failed=False)


def _check_single(hydra: Any) -> None:
    """Refuse what only `-m` does: nothing that was asked for is left out without a word."""

    chosen = hydra.runtime.choices
    words = [f"+{group}={chosen[group]}" for group in ("experiments", "slurm") if group in chosen]
    asked = " ".join(words) or "hydra.sweeper or hydra.launcher"
    if grid := list(hydra.sweeper.get("params") or {}):
        over = ", ".join(str(name).lstrip("+") for name in grid)
        raise InputError(
            f"{asked} is a grid over {over} and runs with -m only: "
            f"rerail -m {' '.join(words)}".rstrip()
        )
    if hydra.launcher.get("executor", "here") != "here":
        raise InputError(
            f"{asked} submits jobs and does so with -m only: rerail -m {' '.join(words)}".rstrip()
        )


def _chosen(hydra: Any) -> tuple[dict[str, str], str]:
    """Return the group names that were chosen, and the command that chooses this cell alone."""
    from omegaconf import OmegaConf

    from rerail.config.numbers import preset_name, unquoted
    from rerail.config.secrets import without_secrets
    from rerail.config.trust import trusted
    from rerail.run.compose import GROUPS

    chosen = {str(g): str(c) for g, c in hydra.runtime.choices.items() if c is not None}
    # Hydra merges the files of a list, so that the last one wins
    if several := [group for group in GROUPS if group not in chosen]:
        raise InputError(
            f"{several[0]} must be one name, and it is a list or nothing; to sweep over several, "
            f"use -m and commas: -m {several[0]}=A,B"
        )
    # as typed: what `${...}` stands for is looked up again by who runs the command
    typed: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    words = [unquoted(word.removeprefix("++")) for word in typed]
    words += [f"trust={name}" for name in trusted()]
    words = ["rerail", *(word for word in words if not word.startswith("out="))]
    # before the shell's quotes, which a secret may need
    command = shlex.join(redacted(without_secrets(words, references=True)))
    return {g: preset_name(g, c) for g, c in chosen.items() if "/" not in g}, command


def describe(config: Any) -> SweepCell:
    """Resolve and check a cell of a sweep; one that cannot run leaves its row, and the reason."""
    Outcome.started = True
    from omegaconf import OmegaConf

    from rerail.config.instantiate import build
    from rerail.config.secrets import escaped, without_secrets
    from rerail.run import pipeline as runner
    from rerail.run.compose import to_cell
    from rerail.run.rows import failed_choice

    names, command = _chosen(config.hydra)
    bare = OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"])
    out = Path(config.out).absolute()
    try:
        cell = to_cell(bare, command, names)
        build(config.logger, "logger")
        plain: Any = OmegaConf.to_container(bare, resolve=True)
        choices = without_secrets(escaped({**plain, "out": str(out)}), references=True)
    except InputError as error:
        row = failed_choice(bare, command, str(error), out)
        name = f"failed-{row['key'][:8]}"
        return SweepCell(str(out), name, row["key"], command, state="failed", reason=str(error))
    state, reason = runner.standing(cell, out)
    return SweepCell(str(out), cell.folder, cell.key, command, names, choices, state, reason)


def run(cell: SweepCell) -> tuple[str, str]:
    """Run or finish a cell of a sweep; its state (done, failed, not_applicable) and the reason.

    Raises:
        InputError: a value cannot be used on this machine, or is not what was submitted.
    """
    set_up_logging()
    from omegaconf import OmegaConf

    from rerail.config.instantiate import build
    from rerail.run.compose import to_cell
    from rerail.run.pipeline import run_or_record

    config = OmegaConf.create(dict(cell.config))
    typed = to_cell(config, cell.command, cell.names)
    if typed.folder != cell.folder:
        raise InputError(
            f"the choices of {cell.folder} read back as {typed.folder}; submit the sweep again"
        )
    rows = run_or_record(typed, Path(config.out), build(config.logger, "logger"))
    for row in rows:
        if row["status"] != "done":
            return str(row["status"]), str(row["reason"])
    return "done", ""
