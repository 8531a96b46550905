"""`rerail`: compress, repair and measure; every Hydra override works, `-m` runs a grid."""

import os
import re
import sys
from collections.abc import Sequence

from rerail.config import numbers
from rerail.config.presets import config_root
from rerail.errors import InputError
from rerail.run import task

# A group's class is its schema: any of its fields can be set, also those that its yaml leaves at
# their defaults. Hydra wants `++` for these; a wrong field is refused when the class is built.
_FIELD = re.compile(
    r"(model|compressor|ratio|skip|allocation|calibration|distill|evaluation|export|logger|trainer)\.\w+="
)


TRUST = "trust="


def _forced(word: str) -> str:
    return f"++{word}" if _FIELD.match(word) else numbers.quoted(word)


def _words(typed: Sequence[str]) -> list[str]:
    """Return what Hydra reads: packages to trust are for this process, and no choice of a cell."""
    from rerail.config.trust import trust

    trust(
        name for word in typed if word.startswith(TRUST) for name in word[len(TRUST) :].split(",")
    )
    return [_forced(word) for word in typed if not word.startswith(TRUST)]


def _refused() -> None:
    """Say what a mistyped override could have meant, after Hydra's own lines."""
    from rerail.cli.suggestions import hints

    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    for sentence in hints(words, config_root()):
        task.complain(sentence)


def main() -> None:
    """Entry point: exit status 0, 2 where something could not be used or a cell failed."""
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

    from rerail.config import search_path
    from rerail.sweep import launcher

    task.set_up_logging()
    search_path.register()
    launcher.register()
    sys.argv[1:] = _words(sys.argv[1:])
    folder = str(config_root() / "conf")
    try:
        hydra.main(version_base="1.3", config_path=folder, config_name="config")(task.task)()
    except SystemExit as error:
        if error.code not in (0, None) and not task.Outcome.started:
            _refused()
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
