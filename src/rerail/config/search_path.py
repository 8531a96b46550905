"""Where Hydra looks beside conf/: the package's experiments/ and slurm/, then here."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from rerail.config import numbers
from rerail.config.overrides import forced
from rerail.config.presets import config_root

SCHEME = "groups"


# Hydra calls what these name, reads files that do, or hands them to a shell before a cell is looked
# at; and two choices by which a file would run the code of a model, or send the key of a server
_RUNS = (
    *(f"hydra.{name}" for name in ("callbacks", "job_logging", "hydra_logging", "searchpath")),
    *("hydra.job.env_set", "hydra.job.env_copy", "model.remote_code", "logger.base_url"),
)
_SUBMITS = "hydra.launcher"  # what a job runs first, say; a profile of slurm/ is there to say it


def _number(source: Any, config_path: str) -> ConfigResult | None:
    """Return the preset that a number stands for; None where the path is no number."""
    node = numbers.node(config_path)
    made = OmegaConf.create(dict(node or {}))
    where = f"{SCHEME}://{source.path}"
    return node and ConfigResult(source.provider, where, made, {"package": None})  # type: ignore[return-value]


def _checked(source: Any, config_path: str, result: ConfigResult) -> ConfigResult:
    """Return what was read, unless it is of the working folder and makes something else run.

    Raises:
        ConfigLoadError: what it names, which Hydra shows as a sentence.
    """
    if Path(source.path) == config_root():
        return result
    runs = _RUNS if config_path.startswith("slurm/") else (*_RUNS, _SUBMITS)
    group = config_path.rpartition("/")[0].replace("/", ".")
    package = str((result.header or {}).get("package") or group).replace("_group_", group)
    plain: Any = OmegaConf.to_container(result.config, resolve=False)
    chosen = plain.pop("defaults", []) if isinstance(plain, dict) else []
    # a value above one of these names stands for what it refers to, and so may a place in Hydra
    places = {f"{package}.{name}": True for name in _set_names(plain)} | {package: False}
    for entry in (key for one in chosen or () for key in (one if isinstance(one, dict) else [one])):
        name, _, place = str(entry).removeprefix("override ").lstrip("/").partition("@")
        places |= {name.replace("/", "."): False, place: False, f"{package}.{place}": False}
    for place, value in places.items():
        named = f"{place}.".replace("_global_.", "")
        above = named if value or named.startswith("hydra.") else None
        if any(named.startswith(f"{run}.") or (above and run.startswith(above)) for run in runs):
            raise ConfigLoadError(
                f"{config_path}.yaml sets {named[:-1]}, which may run code that a file names; set "
                "it on the command line where you want it"
            )
    return result


def _set_names(node: Any) -> Iterator[str]:
    """Yield the dotted names of all values that are set to something."""
    for name, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{inner}" for inner in _set_names(value))
        elif value:
            yield str(name)


def _typed(result: ConfigResult) -> ConfigResult:
    """Return a file in whose grid each word is what it would be on the command line."""
    grid = OmegaConf.select(result.config, "hydra.sweeper.params")
    if OmegaConf.is_dict(grid):
        plain: Any = OmegaConf.to_container(grid, resolve=False)
        words = [forced(f"{name}={value}").partition("=") for name, value in plain.items()]
        result.config.hydra.sweeper.params = {name: value for name, _, value in words}
    return result


@functools.cache
def register() -> None:
    """Add both folders to the search path.

    Only the config groups below them are looked at: a working folder may be large, and Hydra's help
    would walk all of it.
    """
    plugins = Plugins.instance()
    conf = config_root() / "conf"
    known = {"experiments", "slurm", *(p.name for p in conf.iterdir() if p.is_dir())} - {"hydra"}

    class RerailSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("rerail", f"{SCHEME}://{config_root()}")
            search_path.append("here", f"{SCHEME}://{Path.cwd()}")

    plugins.register(_groups(SourcesRegistry.instance().resolve("file"), known))
    plugins.register(RerailSearchPath)


def _groups(files: Any, known: set[str]) -> Any:
    """Return a source of files in some groups; in them a number is a preset, too."""

    class Groups(files):  # type: ignore[misc]
        @staticmethod
        def scheme() -> str:
            return SCHEME

        def is_group(self, config_path: str) -> bool:
            inside = not config_path or config_path.split("/")[0] in known
            return inside and bool(super().is_group(config_path))

        def is_config(self, config_path: str) -> bool:
            return numbers.node(config_path) is not None or bool(super().is_config(config_path))

        def load_config(self, config_path: str) -> ConfigResult:
            made = _number(self, config_path)
            return made or _typed(_checked(self, config_path, super().load_config(config_path)))

        def list(self, config_path: str, results_filter: Any) -> list[str]:
            if config_path:
                return list(super().list(config_path, results_filter))
            return sorted(name for name in known if self.is_group(name))

    return Groups
