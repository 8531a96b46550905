"""From a composed Hydra config to a typed cell; unknown names list what exists."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rerail.errors import InputError
from rerail.run.cell import Cell

GROUPS = (
    "model",
    "compressor",
    "ratio",
    "allocation",
    "calibration",
    "distill",
    "evaluation",
    "export",
)
_VOLATILE = ("out", "logger", "hydra")


def build(config: Any, where: str) -> Any:
    """Instantiate a config node; a wrong field or value becomes one sentence.

    Raises:
        InputError: what is wrong, and what is allowed.
    """
    try:
        _check_fields(OmegaConf.to_container(config, resolve=True, throw_on_missing=True), where)
        return hydra.utils.instantiate(config, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        raise cause or InputError(f"{where}: {str(error).splitlines()[0]}") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{where}: {str(error).splitlines()[0]}") from error


def _check_fields(node: Any, where: str) -> None:
    """Check keys against the class that `_target_` names, all the way down."""
    if isinstance(node, list):
        for i, one in enumerate(node):
            _check_fields(one, f"{where}.{i}")
    if not isinstance(node, Mapping):
        return
    if target := node.get("_target_"):
        allowed = list(inspect.signature(hydra.utils.get_object(target)).parameters)
        for name in node.keys() - {"_target_"} - set(allowed):
            close = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise InputError(f"{where}.{name} does not exist; {hint}allowed: {', '.join(allowed)}")
    for name, one in node.items():
        _check_fields(one, f"{where}.{name}")


def to_cell(config: DictConfig, command: str = "") -> Cell:
    """Return the typed cell of a composed config.

    Raises:
        InputError: a value cannot be used.
    """
    parts = {name: build(config[name], name) for name in GROUPS}
    try:
        choices = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(str(error).splitlines()[0]) from error
    assert isinstance(choices, dict)
    named = dict(HydraConfig.get().runtime.choices) if HydraConfig.initialized() else {}
    names = {str(g): str(c) for g, c in named.items() if c is not None and "/" not in g}
    kept = {str(k): v for k, v in choices.items() if k not in _VOLATILE}
    return Cell(
        **parts,
        trainer=dict(choices["trainer"]),
        seed=int(config.seed),
        prompt=str(config.prompt),
        names=names,
        choices=kept | {"names": {n: names.get(n) for n in GROUPS}, "command": command},
    )
