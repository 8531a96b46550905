"""A cell's choices as a file holds them: secrets stay in the environment."""

import os
from collections.abc import Mapping
from typing import Any

from rerail.config.redaction import without_secrets
from rerail.errors import InputError

_SHORTEST = 8  # a shorter value would be found in ordinary words


def without_secret_values(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data in which values of secret variables are `${oc.env:NAME}` again.

    Any other `${` in `config` is escaped, so that OmegaConf reads the rest back as it is.

    Raises:
        InputError: a value of a telling name is in no variable.
    """
    telling = {n: v for n, v in os.environ.items() if without_secrets({n: "x"}) != {n: "x"}}
    secrets = {value: name for name, value in telling.items() if len(value) >= _SHORTEST}
    made: dict[str, Any] = _replaced({**held, "config": _escaped(held["config"])}, secrets)
    if name := _first_hidden(made, without_secrets(made)):
        raise InputError(
            f"{name} is a secret; put it into an environment variable and write "
            f"{name}='${{oc.env:VARIABLE}}'"
        )
    return made


def _escaped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _escaped(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(one) for one in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def _replaced(value: Any, secrets: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _replaced(one, secrets) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(one, secrets) for one in value]
    if not isinstance(value, str):
        return value
    for secret in sorted(secrets, key=len, reverse=True):
        value = value.replace(secret, f"${{oc.env:{secrets[secret]}}}")
    return value


def _first_hidden(value: Any, hidden: Any, where: str = "") -> str:
    """Return the name of the first value that a row would not show, but for references."""
    if isinstance(value, Mapping):
        parts = [(f"{where}.{n}".strip("."), value[n], hidden[n]) for n in value]
    elif isinstance(value, list):
        parts = [(where, *pair) for pair in zip(value, hidden, strict=True)]
    else:
        reference = isinstance(value, str) and value.startswith("${oc.env:")
        return "" if value == hidden or reference else where.removeprefix("config.")
    return next((n for one in parts if (n := _first_hidden(one[1], one[2], one[0]))), "")
