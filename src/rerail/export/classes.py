"""Model classes of ours, one set a family, made when they are needed."""

import functools
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

from rerail.errors import InputError
from rerail.export.structure import Compressed
from rerail.moe.families import OUTSIDE_THE_SEAM

PREFIX = "rerail_"


class Classes(NamedTuple):
    """The classes of one family: of transformers, or ours."""

    config: Any
    model: Any
    causal: Any


def family_of(config: Any) -> str:
    """Return the model type of the family, also for a config of ours."""
    return str(config.model_type).removeprefix(PREFIX)


def is_stock(config: Any) -> bool:
    """Return whether a config is of transformers, not of ours."""
    return family_of(config) == str(config.model_type)


def stock_classes(family: str) -> Classes:
    """Return the classes that transformers registers for a family.

    Raises:
        InputError: it registers none for causal language models.
    """
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"model family {family!r} has no causal language model in transformers, so "
            "export.form=package and remote cannot hold it; use export.form=native"
        )
    config = CONFIG_MAPPING[family]
    return Classes(config, MODEL_MAPPING[config], MODEL_FOR_CAUSAL_LM_MAPPING[config])


@functools.cache
def our_classes(family: str) -> Classes:
    """Return our classes of a family and make the Auto classes of transformers know them.

    Raises:
        InputError: as `stock_classes`.
    """
    stock = stock_classes(family)
    own = {"__module__": __name__}
    config = _named(stock.config, (stock.config,), {**own, "model_type": PREFIX + family})
    bodies = [
        _named(base, (Compressed, base), {**own, "config_class": config}) for base in stock[1:]
    ]
    ours = Classes(config, *bodies)
    AutoConfig.register(PREFIX + family, ours.config, exist_ok=True)
    AutoModel.register(ours.config, ours.model, exist_ok=True)
    AutoModelForCausalLM.register(ours.config, ours.causal, exist_ok=True)
    return ours


def _named(stock: Any, bases: tuple[Any, ...], fields: dict[str, Any]) -> Any:
    return type(our_name(stock), bases, fields)


def our_name(stock: Any) -> str:
    """Return the name of our class for a stock one."""
    return f"Rerail{stock.__name__}"


def register_families() -> None:
    """Make AutoConfig know every model type of ours; a family is imported on its first use."""
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if family not in OUTSIDE_THE_SEAM and PREFIX + family not in CONFIG_MAPPING:
            lazy: Any = type(f"Rerail{family}", (_LazyConfig,), {"family": family})
            AutoConfig.register(PREFIX + family, lazy)


class _LazyConfig:
    """Stands for a config class that is not made yet."""

    family: str

    @classmethod
    def from_dict(cls, fields: dict[str, Any], **options: Any) -> Any:
        """Make the family's classes, then read as their config class does."""
        return our_classes(cls.family).config.from_dict(fields, **options)
