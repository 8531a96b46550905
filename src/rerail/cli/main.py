"""`rerail`: compress, repair and measure; every Hydra override works, `-m` runs a grid."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rerail.config.overrides import forced
from rerail.config.presets import config_root
from rerail.config.secrets import guard_streams
from rerail.errors import InputError
from rerail.run import task

TRUST = "trust="


def _words(typed: Sequence[str]) -> list[str]:
    """Return what Hydra reads: packages to trust are for this process, and no choice of a cell."""
    from rerail.config.trust import trust

    trust(
        name for word in typed if word.startswith(TRUST) for name in word[len(TRUST) :].split(",")
    )
    words = [forced(word) for word in typed if not word.startswith(TRUST)]
    # Hydra's parser takes no flag between overrides
    return sorted(words, key=lambda word: word not in ("-m", "--multirun"))


def _reported(compose_and_run: Callable[[], Any]) -> Any:
    """Call what Hydra would report with a traceback: before a cell begins, a choice is wrong."""
    from rerail.cli.suggestions import hints

    try:
        return compose_and_run()
    except Exception as error:
        if task.Outcome.started:
            raise
        words = [word for word in sys.argv[1:] if not word.startswith("-")]
        for line in hints(words, config_root()) or _lines(error):
            task.complain(line)
        sys.exit(2)


def _lines(error: Exception) -> list[str]:
    """Return what Hydra has against the choices, without its advice to add what is not known."""
    from hydra.errors import CompactHydraException
    from omegaconf.errors import OmegaConfBaseException

    from rerail.config.instantiate import sentence

    if isinstance(error, OmegaConfBaseException):
        return [sentence(error)]
    if not isinstance(error, CompactHydraException):
        return [
            f"these choices cannot be composed: {type(error).__name__}: {error}".splitlines()[0]
        ]
    text = "\n".join(line for line in str(error).splitlines() if not line.startswith("To append"))
    cause = error.__cause__
    return [text, *([sentence(cause)] if isinstance(cause, OmegaConfBaseException) else [])]


def main() -> None:
    """Entry point: exit status 0, 2 where something could not be used or a cell failed."""
    guard_streams()
    try:
        if sys.argv[1:2] == ["demo"]:
            from rerail.cli.demo import demo

            sys.exit(demo(sys.argv[2:]))
        _compose_and_run()
        if task.Outcome.out is not None and "RERAIL_NO_SUMMARY" not in os.environ:
            from rerail.cli.screen import finish

            finish(task.Outcome.out)
    except InputError as error:
        task.complain(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(2 if task.Outcome.failed else 0)


def _compose_and_run() -> None:
    """Let Hydra compose the cells that were typed, and run them."""
    import hydra
    from hydra._internal import utils

    from rerail.config import search_path
    from rerail.sweep import launcher

    task.set_up_logging()
    search_path.register()
    launcher.register()
    utils.run_and_report = _reported  # type: ignore[assignment]
    sys.argv[1:] = _words(sys.argv[1:])
    folder = str(config_root() / "conf")
    hydra.main(version_base="1.3", config_path=folder, config_name="config")(task.task)()


if __name__ == "__main__":
    main()
