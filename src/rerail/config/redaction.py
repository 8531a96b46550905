"""Secrets stay out of what is written or sent."""

import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(r"secret|passw|credential|api_?key|access_?key|(^|_)token$", re.I)


def without_secrets(value: Any, name: str = "") -> Any:
    """Return a value with secrets hidden: all of a telling name, and known ones anywhere."""
    if isinstance(value, Mapping):
        return {str(key): without_secrets(one, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(one, name) for one in value]
    if not isinstance(value, str):
        return value
    if _SECRET.search(name):
        return "(hidden)"
    for known in (v for k, v in os.environ.items() if _SECRET.search(k) and len(v) > 7):
        value = value.replace(known, "(hidden)")
    return value
