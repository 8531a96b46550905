"""Tensors of a checkpoint that the loaded class has no place for.

transformers leaves layers that predict further tokens (MTP) and towers of other senses out without
a word, where the family's class names them as such.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rerail.moe.families import ignored_patterns
from rerail.moe.stored_tensors import StoredTensor

_ATTRIBUTE = "rerail_left_out"
_SENSES = re.compile(r"visual|vision|audio")
_CLAIMS = re.compile(r"nextn|mtp|multi_token")


def note_left_out(
    model: Any, tensors: Mapping[str, StoredTensor], unexpected: Iterable[str]
) -> None:
    """Note on a model of transformers which tensors of its checkpoint it does not have.

    Args:
        model: as it was loaded.
        tensors: of the checkpoint, by their stored names.
        unexpected: names that transformers reported.
    """
    layers = {n for n, _ in model.named_modules() if re.search(r"\.\d+$", n)}
    patterns = [re.compile(pattern) for pattern in ignored_patterns(model)]
    silent = {n for n in tensors if any(p.search(n) for p in patterns) and not _within(n, layers)}
    setattr(model, _ATTRIBUTE, tuple(sorted(silent | set(unexpected))))


def left_out_of(model: Any) -> tuple[str, ...]:
    """Return the names of tensors that the model's checkpoint has and the model has not."""
    return tuple(getattr(model, _ATTRIBUTE, ()))


def parts_of(names: Iterable[str]) -> dict[str, int]:
    """Return the number of tensors below each part of a model, such as `model.layers.61`."""
    parts: Counter[str] = Counter()
    for name in names:
        path = name.split(".")
        parts[".".join(path[: 3 if path[1:2] == ["layers"] else 2])] += 1
    return dict(parts)


def withdraw_claims(config: Any, names: Iterable[str]) -> None:
    """Let a config claim no layers for further tokens when their tensors are not there, in place.

    Args:
        config: of transformers.
        names: tensors that are not there.
    """
    if all(_SENSES.search(name) for name in names):
        return
    for name, value in list(config.to_dict().items()):
        if _CLAIMS.search(name) and isinstance(value, int | list):
            setattr(config, name, type(value)())


def _within(name: str, layers: set[str]) -> bool:
    """Return whether a tensor belongs to a layer that the model has."""
    path = name.split(".")
    return any(".".join(path[:depth]) in layers for depth in range(1, len(path)))
