"""Where conf/, experiments/ and slurm/ lie, and presets by name outside of the command line."""

from pathlib import Path
from typing import Any

from rerail.errors import InputError


def config_root() -> Path:
    """Return the folder with conf/, experiments/ and slurm/: the package's, or the checkout's."""
    package = Path(__file__).parents[1]
    return package if (package / "conf").is_dir() else package.parents[1]


def preset(group: str, name: str, **fields: Any) -> Any:
    """Build what conf/`group`/`name`.yaml names, with fields changed.

    Raises:
        InputError: there is no such preset (those that exist are listed), or a field is wrong.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from rerail.config.instantiate import build

    folder = config_root() / "conf"
    if not (folder / group / f"{name}.yaml").exists():
        known = ", ".join(sorted(p.stem for p in (folder / group).glob("*.yaml")))
        raise InputError(f"{group}={name!r} does not exist; allowed: {known or 'no such group'}")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder), version_base="1.3"):
        config = compose("config", [f"{group}={name}"])
    for field, value in fields.items():
        OmegaConf.update(config, f"{group}.{field}", value, force_add=True)
    return build(config[group], group)
