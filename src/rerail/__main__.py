"""`rerail`: compress, repair and measure; every Hydra override works, `-m` runs a grid."""

import logging
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from rerail.run.presets import config_root

# A group's class is its schema: any of its fields can be set, also those that its yaml leaves at
# their defaults. Hydra wants `++` for these; a wrong field is refused when the class is built.
_FIELD = re.compile(
    r"(model|compressor|ratio|skip|allocation|calibration|distill|evaluation|export|logger|trainer)\.\w+="
)


def _forced(word: str) -> str:
    return f"++{word}" if _FIELD.match(word) else word


class Outcome:
    """What happened so far in this process."""

    started = False
    failed = False
    multirun = False
    out: Path | None = None


def _task(config: Any) -> None:
    Outcome.started = True
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from rerail.errors import InputError
    from rerail.run.compose import build, to_cell
    from rerail.run.rows import failed_choice
    from rerail.run.runner import run_cell, run_or_record

    _quiet_lightning()
    Outcome.multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    out = Path(config.out).absolute()
    words = [o.removeprefix("++") for o in HydraConfig.get().overrides.task]
    command = shlex.join(["rerail", *(word for word in words if not word.startswith("out="))])
    try:
        cell = to_cell(config, command)
        mirror = build(config.logger, "logger")
        if not Outcome.multirun:
            run_cell(cell, out, mirror)
            Outcome.out = out
            return
        rows = run_or_record(cell, out, mirror)
    except InputError as error:
        Outcome.failed = True
        if not Outcome.multirun:
            _complain(str(error))
            return
        rows = [failed_choice(config, command, str(error), out)]
    Outcome.out = out
    for row in rows:
        if row["status"] != "done":
            Outcome.failed = Outcome.failed or row["status"] == "failed"
            _complain(f"{row['reason']}")


def _complain(sentence: str) -> None:
    sys.stderr.write(f"rerail: {sentence}\n")


def _quiet() -> None:
    """Choose what a person wants to see: our own lines and the progress bars."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("rerail").setLevel(logging.INFO)


def _quiet_lightning() -> None:
    """Lightning sets its own level when it is imported, so this comes after."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")


def _refused() -> None:
    """Say what a mistyped override could have meant, after Hydra's own lines."""
    from rerail.run.hints import hints

    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    for sentence in hints(words, config_root()):
        _complain(sentence)


def main() -> None:
    """Entry point: exit status 0, 2 where something could not be used or a cell failed."""
    import hydra

    from rerail.run.searching import register

    if len(sys.argv) > 1 and sys.argv[1] == "demo":
        from rerail.run.demo import demo

        sys.exit(demo(sys.argv[2:]))
    _quiet()
    register()
    sys.argv[1:] = map(_forced, sys.argv[1:])
    folder = str(config_root() / "conf")
    try:
        hydra.main(version_base="1.3", config_path=folder, config_name="config")(_task)()
    except SystemExit as error:
        if error.code not in (0, None) and not Outcome.started:
            _refused()
            sys.exit(2)
        raise
    if Outcome.out is not None and "RERAIL_NO_SUMMARY" not in os.environ:
        from rerail.run.screen import finish

        finish(Outcome.out)
    sys.exit(2 if Outcome.failed else 0)


if __name__ == "__main__":
    main()
