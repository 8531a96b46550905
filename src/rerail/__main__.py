"""`rerail`: compress, repair and measure; every Hydra override works, `-m` runs a grid."""

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any


def config_root() -> Path:
    """Return the folder that holds conf/, experiments/ and slurm/: the package's, or the checkout's."""
    package = Path(__file__).parent
    return package if (package / "conf").is_dir() else package.parents[1]


class Outcome:
    """What happened so far in this process."""

    started = False
    failed = False
    multirun = False
    out: Path | None = None


def _task(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from rerail.errors import InputError
    from rerail.run.compose import build, to_cell
    from rerail.run.runner import run_cell, run_or_record
    from rerail.run.screen import failed_choice

    Outcome.started = True
    Outcome.multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    out = Outcome.out = Path(config.out).absolute()
    words = [o for o in HydraConfig.get().overrides.task if not o.startswith("out=")]
    command = shlex.join(["rerail", *words])
    try:
        cell = to_cell(config, command)
        mirror = build(config.logger, "logger")
        if not Outcome.multirun:
            run_cell(cell, out, mirror)
            return
        rows = run_or_record(cell, out, mirror)
    except InputError as error:
        Outcome.failed = True
        if not Outcome.multirun:
            _complain(str(error))
            return
        rows = [failed_choice(config, command, str(error), out)]
    for row in rows:
        if row["status"] != "done":
            Outcome.failed = Outcome.failed or row["status"] == "failed"
            _complain(f"{row['reason']}")


def _complain(sentence: str) -> None:
    sys.stderr.write(f"rerail: {sentence}\n")


def _search_path() -> None:
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class RerailSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("rerail", f"file://{config_root()}")
            search_path.append("rerail-cwd", f"file://{Path.cwd()}")

    Plugins.instance().register(RerailSearchPath)


def _quiet() -> None:
    """Choose what a person wants to see: our own lines, and warnings of others."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("rerail").setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Entry point: exit status 0, 2 where something could not be used or a cell failed."""
    import hydra

    if len(sys.argv) > 1 and sys.argv[1] == "demo":
        from rerail.run.demo import demo

        sys.exit(demo(sys.argv[2:]))
    _quiet()
    _search_path()
    try:
        hydra.main(
            version_base="1.3", config_path=str(config_root() / "conf"), config_name="config"
        )(_task)()
    except SystemExit as error:
        if error.code not in (0, None):
            sys.exit(1 if Outcome.started else 2)
        raise
    if Outcome.out is not None and "RERAIL_NO_SUMMARY" not in os.environ:
        from rerail.run.screen import finish

        finish(Outcome.out)
    sys.exit(2 if Outcome.failed else 0)


if __name__ == "__main__":
    main()
