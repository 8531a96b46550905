"""From a composed Hydra config to a typed cell."""

from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rerail.config.fields import check_names, check_value
from rerail.config.instantiate import build, resolved
from rerail.config.numbers import preset_name
from rerail.config.presets import model_name
from rerail.config.secrets import without_secrets
from rerail.distill.trainer import trainer_argument_names
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
    "skip",
    "export",
)
_VOLATILE = ("out", "logger", "hydra")


def to_cell(config: DictConfig, command: str = "", names: Mapping[str, str] | None = None) -> Cell:
    """Return the typed cell of a composed config.

    Args:
        config: without its hydra node.
        command: that composes it.
        names: the choice of each group; None asks Hydra.

    Raises:
        InputError: a value cannot be used.
    """
    parts = {name: build(config.get(name), name) for name in GROUPS}
    choices = resolved(config, "config")
    _check(choices)
    if names is None:
        named = dict(HydraConfig.get().runtime.choices) if HydraConfig.initialized() else {}
        names = {str(g): str(c) for g, c in named.items() if c is not None and "/" not in g}
        names = {group: preset_name(group, name) for group, name in names.items()}
    names = {**names, "model": model_name(names.get("model"), choices["model"])}
    decided = {str(k): v for k, v in choices.items() if k not in _VOLATILE}
    shown = {"names": {n: names.get(n) for n in GROUPS}, "command": command}
    return Cell(
        **parts,
        trainer=dict(choices["trainer"]),
        seed=choices["seed"],
        prompt=choices["prompt"],
        names=dict(names),
        choices=without_secrets(decided | shown),
    )


def _check(choices: Mapping[str, Any]) -> None:
    """Check what belongs to no group: every class checks its own fields."""
    kinds: Mapping[str, Any] = {
        "seed": int,
        "prompt": str,
        "out": str,
        "trainer": Mapping[str, Any],
        "samples": Mapping[str, Any],
    }
    check_names(choices, [*GROUPS, *kinds, "logger", "debug"], "")
    for name, kind in kinds.items():
        check_value(choices.get(name), kind, name)
    check_names(choices["samples"], ["count"], "samples")
    check_names(choices.get("debug") or (), [], "debug")
    check_names(choices["trainer"], list(trainer_argument_names()), "trainer")
    if named := [name for name, value in choices["trainer"].items() if _names_class(value)]:
        raise InputError(
            f"trainer.{named[0]} names a class, and the trainer's arguments are plain values; "
            "hand objects over in Python, in api.repair(..., trainer={...})"
        )


def _names_class(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_names_class, value.values()))
    return isinstance(value, list) and any(map(_names_class, value))
