"""From a composed Hydra config to a typed cell."""

from collections.abc import Mapping

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rerail.config.instantiate import build, check_names, check_value
from rerail.config.secrets import without_secrets
from rerail.distill.trainer import trainer_argument_names
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
    parts = {name: build(config[name], name) for name in GROUPS}  # also resolves every choice
    choices = OmegaConf.to_container(config, resolve=True)
    assert isinstance(choices, dict)
    check_value(choices["seed"], int, "seed")
    check_names(choices["trainer"], list(trainer_argument_names()), "trainer")
    if names is None:
        named = dict(HydraConfig.get().runtime.choices) if HydraConfig.initialized() else {}
        names = {str(g): str(c) for g, c in named.items() if c is not None and "/" not in g}
    decided = {str(k): v for k, v in choices.items() if k not in _VOLATILE}
    shown = {"names": {n: names.get(n) for n in GROUPS}, "command": command}
    return Cell(
        **parts,
        trainer=dict(choices["trainer"]),
        seed=int(config.seed),
        prompt=str(config.prompt),
        names=dict(names),
        choices=without_secrets(decided | shown),
    )
