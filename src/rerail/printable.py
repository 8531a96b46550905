"""What strangers wrote, made safe to show: on a terminal and in a spreadsheet."""

import re
from collections.abc import Mapping
from typing import Any

# control characters but tab and newline, those that turn the direction of writing, half characters
_ACTING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# what a spreadsheet takes for the beginning of a formula, in ASCII and in full width
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")


def printable(value: Any) -> Any:
    """Return text, or plain data with texts in it, in which no character acts on a terminal.

    Such a character is shown as U+FFFD. Tabs and newlines stay.
    """
    if isinstance(value, str):
        return _ACTING.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {printable(name): printable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [printable(inner) for inner in value]
    return value


def spreadsheet_field(value: Any) -> Any:
    """Return a field of a table that no spreadsheet runs as a formula: then a `'` stands before it.

    Numbers stay as they are.
    """
    if not isinstance(value, str):
        return value
    text = str(printable(value))
    return f"'{text}" if _FORMULA.match(value) else text
