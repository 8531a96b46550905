"""Where Hydra looks beside conf/: the package's experiments/ and slurm/, then here."""

import functools
from pathlib import Path
from typing import Any

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from rerail.config.presets import config_root

SCHEME = "groups"


@functools.cache
def register() -> None:
    """Add both folders to the search path.

    Only the config groups below them are looked at: a working folder may be large, and Hydra's help
    would walk all of it.
    """
    plugins = Plugins.instance()
    files: Any = SourcesRegistry.instance().resolve("file")
    conf = config_root() / "conf"
    known = {"experiments", "slurm", *(p.name for p in conf.iterdir() if p.is_dir())} - {"hydra"}

    class Groups(files):  # type: ignore[misc]
        @staticmethod
        def scheme() -> str:
            return SCHEME

        def is_group(self, config_path: str) -> bool:
            inside = not config_path or config_path.split("/")[0] in known
            return inside and bool(super().is_group(config_path))

        def list(self, config_path: str, results_filter: Any) -> list[str]:
            if config_path:
                return list(super().list(config_path, results_filter))
            return sorted(name for name in known if self.is_group(name))

    class RerailSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("rerail", f"{SCHEME}://{config_root()}")
            search_path.append("here", f"{SCHEME}://{Path.cwd()}")

    plugins.register(Groups)
    plugins.register(RerailSearchPath)
