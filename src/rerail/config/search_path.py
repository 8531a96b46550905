"""Where Hydra looks beside conf/: the package's experiments/ and slurm/, then here."""

import functools
from pathlib import Path
from typing import Any

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from rerail.config import numbers
from rerail.config.presets import config_root

SCHEME = "groups"


# Hydra calls what these name, or reads files that do, before a cell is looked at
_RUNS = ("callbacks", "job_logging", "hydra_logging", "searchpath", "job.env_set", "job.env_copy")


def _number(source: Any, config_path: str) -> ConfigResult | None:
    """Return the preset that a number stands for; None where the path is no number."""
    node = numbers.node(config_path)
    made = OmegaConf.create(dict(node or {}))
    where = f"{SCHEME}://{source.path}"
    return node and ConfigResult(source.provider, where, made, {"package": None})  # type: ignore[return-value]


def _checked(source: Any, config_path: str, result: ConfigResult) -> ConfigResult:
    """Return what was read, unless it is of the working folder and makes Hydra run code.

    Raises:
        ConfigLoadError: what it names, which Hydra shows as a sentence.
    """
    if Path(source.path) == config_root():
        return result
    package = str((result.header or {}).get("package", ""))
    plain: Any = OmegaConf.to_container(result.config, resolve=False)
    chosen = plain.get("defaults", []) if isinstance(plain, dict) else []
    overridden = [str(key) for one in chosen if isinstance(one, dict) for key in one]
    nodes = [name for name in _RUNS if OmegaConf.select(result.config, f"hydra.{name}")]
    nodes += [key for key in overridden if any(name in key for name in _RUNS)]
    if package.startswith("hydra") or config_path.startswith("hydra/"):
        nodes.append(package or config_path)
    if nodes:
        raise ConfigLoadError(
            f"{config_path}.yaml sets {nodes[0]} of Hydra, which runs code that a file names; "
            "set it on the command line where you want it"
        )
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
            return made or _checked(self, config_path, super().load_config(config_path))

        def list(self, config_path: str, results_filter: Any) -> list[str]:
            if config_path:
                return list(super().list(config_path, results_filter))
            return sorted(name for name in known if self.is_group(name))

    return Groups
