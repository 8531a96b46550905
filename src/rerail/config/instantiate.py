"""Objects from config nodes; a wrong field or value becomes one sentence."""

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import hydra
from beartype import BeartypeConf
from beartype.door import is_bearable
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rerail.errors import InputError

_NUMBERS = BeartypeConf(is_pep484_tower=True)  # an int will do where a float is asked for


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
        raise InputError(f"{where}: {_sentence(str(error).splitlines()[0])}") from error


def _sentence(message: str) -> str:
    """Return OmegaConf's message as a sentence for users."""
    if unset := re.search(r"Environment variable '(\w+)' not found", message):
        return f"the environment variable {unset[1]} is not set; set it to the data folder"
    if missing := re.search(r"Missing mandatory value: (\S+)", message):
        return f"{missing[1]} must be given; it has no default"
    return message


def _check_fields(node: Any, where: str) -> None:
    """Check keys and plain values against the class that `_target_` names, all the way down."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            _check_fields(item, f"{where}.{i}")
    if not isinstance(node, Mapping):
        return
    if target := node.get("_target_"):
        made = hydra.utils.get_object(target)
        check_names(node.keys() - {"_target_"}, list(inspect.signature(made).parameters), where)
        for name, hint in get_type_hints(made).items():
            if name in node:
                check_value(node[name], hint, f"{where}.{name}")
    for name, item in node.items():
        _check_fields(item, f"{where}.{name}")


def check_names(names: Iterable[Any], allowed: Sequence[str], where: str) -> None:
    """Raise InputError for a name that is not allowed; it names the nearest and lists all."""
    for name in sorted(set(map(str, names)) - set(allowed)):
        close = difflib.get_close_matches(name, allowed, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InputError(f"{where}.{name} does not exist; {hint}allowed: {', '.join(allowed)}")


def check_value(value: Any, hint: Any, where: str) -> None:
    """Check a plain value (no list or mapping, which their own classes check) against its type."""
    if isinstance(value, list | dict) or is_bearable(value, hint, conf=_NUMBERS):
        return
    if get_origin(hint) is Literal:
        expected = f"one of {', '.join(map(str, get_args(hint)))}"
    else:
        expected = getattr(hint, "__name__", None) or str(hint)
    raise InputError(f"{where}={value!r} is not {expected}")
