"""What the pages show to readers: their commands, composed as the command line composes them."""

import re
import shlex
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from rerail.config.overrides import forced

ROOT = Path(__file__).parents[1]


def composed(*overrides: str) -> Any:
    GlobalHydra.instance().clear()
    search = f"hydra.searchpath=[file://{ROOT}]"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [search, *overrides])


def code_of(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands_of(page: str) -> list[str]:
    """Return the lines of a page's shell blocks without their comments."""
    lines = [line for block in code_of(page, "bash") for line in block.splitlines()]
    return [command for line in lines if (command := line.split("  #")[0].strip())]


def cell_commands(page: str) -> list[str]:
    """Return the commands of a page that run cells."""
    commands = [command.removeprefix(".venv/bin/") for command in commands_of(page)]
    return [c for c in commands if c.startswith("rerail ") and c != "rerail demo"]


def first_cell(command: str) -> Any:
    """Return the config of a command, of its first cell where it runs a grid."""
    words = [forced(word) for word in shlex.split(command)[1:] if not word.startswith("-")]
    first = []
    for override in OverridesParser.create().parse_overrides(words):
        key, _, _ = str(override.input_line).partition("=")
        swept = override.is_sweep_override()
        first.append(
            f"{key}={next(override.sweep_string_iterator())}" if swept else f"{override.input_line}"
        )
    return composed(*first)
