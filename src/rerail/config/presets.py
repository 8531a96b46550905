"""Where conf/, experiments/ and slurm/ lie, and presets by name outside of the command line."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rerail.errors import InputError
from rerail.files import digest, is_folder


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


def model_name(preset: str | None, node: Mapping[str, Any]) -> str:
    """Return the name of what is loaded: its own, its preset's, or the last part of another path.

    A few digits make the last part unique, since two folders may end in the same word; a folder has
    one name however its path is written.

    Args:
        preset: that was chosen, if any.
        node: the resolved choices of the model.
    """
    path, revision = str(node["path_or_id"]), node.get("revision")
    if name := node.get("name"):
        return str(name)
    file = config_root() / "conf" / "model" / f"{preset}.yaml"
    known = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if preset and (path, revision) == (known.get("path_or_id"), known.get("revision")):
        return preset
    folder = Path(path).expanduser()
    if is_folder(folder):
        path = str(folder.resolve())
    last = re.sub(r"[^\w.]+", "_", re.split(r"[/:]", path.rstrip("/"))[-1]) or "model"
    return f"{last}_{digest([path, revision])[:4]}"
