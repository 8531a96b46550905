"""Secrets stay out of what is written or sent: one redaction for every writer."""

import os
import re
from collections.abc import Mapping
from typing import Any

from rerail.errors import InputError

HIDDEN = "(hidden)"
_TELLING = re.compile(r"secret|passw|credential|api_?key|access_?key|(^|_)token$", re.I)
_SHORTEST = 8  # a shorter value would be found in ordinary words


def without_secrets(
    value: Any, name: str = "", *, references: bool = False, where: str = ""
) -> Any:
    """Return plain data without secrets: all values of a telling name, and known ones anywhere.

    Known are the values of environment variables of a telling name.

    Args:
        value: mappings, lists and plain values.
        name: of the value.
        references: write a known secret as `${oc.env:VARIABLE}`, from which OmegaConf reads it back
            in the same environment, and refuse a secret that is in no variable.
        where: the names around the value, for the sentence.

    Raises:
        InputError: with `references`, a value of a telling name is in no variable.
    """
    if isinstance(value, Mapping):
        return {
            str(key): without_secrets(
                item, str(key), references=references, where=f"{where}.{key}".strip(".")
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item, name, references=references, where=where) for item in value]
    if not isinstance(value, str):
        return value
    for variable, secret in _known():
        value = value.replace(secret, f"${{oc.env:{variable}}}" if references else HIDDEN)
    if not _TELLING.search(name) or (references and value.startswith("${oc.env:")):
        return value
    if references:
        raise InputError(
            f"{where} is a secret; put it into an environment variable and write "
            f"{where}='${{oc.env:VARIABLE}}'"
        )
    return HIDDEN


def _known() -> list[tuple[str, str]]:
    """Return secret variables with their values, the longest value first."""
    telling = [(n, v) for n, v in os.environ.items() if _TELLING.search(n) and len(v) >= _SHORTEST]
    return sorted(telling, key=lambda variable: -len(variable[1]))


def escaped(value: Any) -> Any:
    """Return resolved choices with `${` escaped, so that OmegaConf reads them back as they are."""
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value
