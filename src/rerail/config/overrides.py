"""Overrides as a person types them, on the command line or in the grid of a claim."""

import re

from rerail.config import numbers

# A group's class is its schema: any of its fields can be set, also those that its yaml leaves at
# their defaults. Hydra wants `++` for these; a wrong field is refused when the class is built.
_FIELD = re.compile(
    r"(model|compressor|ratio|skip|allocation|calibration|distill|evaluation|export|logger|trainer)\.\w+="
)


def forced(word: str) -> str:
    """Return an override as Hydra reads it."""
    return f"++{word}" if _FIELD.match(word) else numbers.quoted(word)
