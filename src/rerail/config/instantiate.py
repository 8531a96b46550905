"""Objects from config nodes; a wrong class, field or value becomes one sentence."""

import inspect
import re
from collections.abc import Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rerail.config.fields import check_names, check_value
from rerail.config.trust import bases_of, class_of, classes_in
from rerail.errors import InputError


def build(config: Any, group: str) -> Any:
    """Build what the node of a group names; every field is checked before its class is called.

    Hydra's own instantiation would import and call whatever a file names.

    Raises:
        InputError: what is wrong, and what is allowed.
    """
    kind = reduce(or_, bases_of(group))
    made = _made(resolved(config, group), kind, group)
    if not isinstance(made, kind):
        check_value(made, kind, group)
    return made


def resolved(config: Any, where: str) -> Any:
    """Return a node as plain data without interpolations.

    Raises:
        InputError: a value is missing, or refers to what is not there.
    """
    if not OmegaConf.is_config(config):
        return config
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(sentence(error, where)) from error


def sentence(error: OmegaConfBaseException, where: str = "") -> str:
    """Return OmegaConf's message as a sentence for users."""
    place, message = getattr(error, "full_key", None) or where, str(error).splitlines()[0]
    if isinstance(error, MissingMandatoryValue):
        return f"{place} must be given; it has no default"
    if unset := re.search(r"Environment variable '([^']+)' not found", message):
        folder = "set it to the data folder" if unset[1] == "RERAIL_DATA" else "set it first"
        message = f"the environment variable {unset[1]} is not set; {folder}"
    return f"{place}: {message}" if place else message


def _made(node: Any, hint: Any, where: str) -> Any:
    """Return plain data with objects in the place of the nodes that name a class."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            return _object(node, hint, where)
        return {name: _made(item, hint, f"{where}.{name}") for name, item in node.items()}
    if isinstance(node, list):
        made = [_made(item, hint, f"{where}.{i}") for i, item in enumerate(node)]
        return tuple(made) if get_origin(hint) is tuple else made
    if isinstance(node, Path) and Path not in classes_in(hint):
        return str(node)
    return node


def _object(node: Mapping[str, Any], hint: Any, where: str) -> Any:
    made = class_of(node["_target_"], classes_in(hint), where)
    parameters = inspect.signature(made).parameters
    given = {name: value for name, value in node.items() if name != "_target_"}
    check_names(given, list(parameters), where)
    hints = {**get_type_hints(made), **get_type_hints(made.__init__)}  # type: ignore[misc]
    for name, parameter in parameters.items():
        if name in given:
            asked = hints.get(name, Any)
            given[name] = _made(given[name], asked, f"{where}.{name}")
            check_value(given[name], asked, f"{where}.{name}")
        elif parameter.default is parameter.empty:
            raise InputError(f"{where}.{name} must be given; it has no default")
    try:
        return made(**given)
    except InputError:
        raise
    except Exception as error:  # of a class that does not check its own values
        raise InputError(f"{where}: {type(error).__name__}: {error}".splitlines()[0]) from error
