"""Secrets stay out of what is written, printed or sent: one redaction for every writer.

Known are the values of environment variables of a telling name. `redacted` replaces them where
bytes leave the process, before anything is escaped; they are also known as quotes, JSON, HTML and
addresses spell them, since a sentence that quotes a value has escaped it already.
"""

import html
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from rerail.errors import InputError

HIDDEN = "(hidden)"
_TELLING = re.compile(r"secret|passw|credential|api_?key|access_?key|(^|_)token$", re.I)
_VARIABLE = re.compile(rf"{_TELLING.pattern}|private_?key|(^|_)(tokens?|pat|auth|key)(_|$)", re.I)
_SHORTEST = 8  # a shorter value would be found in ordinary words


def redacted(value: Any) -> Any:
    """Return plain data, or a text, without the values of secret variables, however spelled."""
    spellings = [spelled for _, secret in _known() for spelled in _spellings(secret)]
    return _replaced(value, spellings) if spellings else value


def _replaced(value: Any, spellings: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {_replaced(k, spellings): _replaced(item, spellings) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, spellings) for item in value]
    if isinstance(value, str):
        for spelled in spellings:
            value = value.replace(spelled, HIDDEN)
    return value


def without_secrets(
    value: Any, name: str = "", *, references: bool = False, where: str = ""
) -> Any:
    """Return choices without secrets: all values of a telling name, and known ones anywhere.

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
    value = _referring(value) if references else redacted(value)
    if not _TELLING.search(name) or (references and value.startswith("${oc.env:")):
        return value
    if references:
        raise InputError(
            f"{where} is a secret; put it into an environment variable and write "
            f"{where}='${{oc.env:VARIABLE}}'"
        )
    return HIDDEN


def _referring(value: str) -> str:
    for variable, secret in _known():
        for spelled in (escaped(secret), secret):
            value = value.replace(spelled, f"${{oc.env:{variable}}}")
    return value


def _known() -> list[tuple[str, str]]:
    """Return secret variables with their values, the longest value first."""
    telling = [(n, v) for n, v in os.environ.items() if _VARIABLE.search(n) and len(v) >= _SHORTEST]
    return sorted(telling, key=lambda variable: -len(variable[1]))


def _spellings(secret: str) -> list[str]:
    """Return a secret as it is and as it may have been escaped, the longest first."""
    quoted = (repr(secret)[1:-1], json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False))
    typed = (secret.replace("'", "\\'"), secret.replace('"', '\\"'), shlex.quote(secret)[1:-1])
    page = html.escape(secret)
    pages = (page, page.replace("&#x27;", "&#39;").replace("&quot;", "&#34;"))
    sent = (*pages, html.escape(secret, quote=False), quote(secret), quote(secret, ""))
    made = {secret, escaped(secret), *quoted[:2], quoted[2][1:-1], *typed, *sent}
    return sorted((one for one in made if len(one) >= _SHORTEST), key=len, reverse=True)


def escaped(value: Any) -> Any:
    """Return resolved choices with `${` escaped, so that OmegaConf reads them back as they are."""
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


class _Guarded:
    """A text stream that redacts what is written; in all else the stream that it stands before."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


def guard_streams() -> None:
    """Redact what this process prints; a character that the terminal lacks becomes `?`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, _Guarded):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, _Guarded(stream))
