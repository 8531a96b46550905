"""Tensors of a checkpoint that the loaded class has no place for.

transformers leaves layers that predict further tokens (MTP) and towers of other senses out, without
a word where the family's class names them as such. An export carries them over unchanged, unless
they depend on what was compressed: a tower does not, and neither do further layers without experts.
Further layers with experts of their own have as many as the config says, so they fit as long as the
config keeps its counts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rerail.files import read_json
from rerail.moe.families import config_owners, expert_entries, own_names
from rerail.moe.number_format import is_packed_tensor
from rerail.moe.stored_tensors import StoredTensor

_ATTRIBUTE = "rerail_left_out"
_SENSES = re.compile(r"visual|vision|audio|talker|code2wav")
_EXPERTS = re.compile(r"(?<!shared_)experts\b")
_CLAIMS = re.compile(r"nextn|mtp|multi_token")


@dataclass(frozen=True)
class LeftOut:
    """What a checkpoint has and a model that was loaded from it has not.

    Attributes:
        names: as they are stored.
        tensors: those that lie in safetensors files, by name.
        folder: of the checkpoint, where it is known.
        experts: what its config says of the number and the width of experts.
    """

    names: tuple[str, ...] = ()
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    folder: Path | None = None
    experts: Mapping[str, int] = field(default_factory=dict)


NOTHING = LeftOut()


def not_carried(model: Any, unexpected: Iterable[str], manifest: Path) -> list[str]:
    """Return the unexpected names that an export did not carry over from its parent, sorted.

    Args:
        model: as it was loaded.
        unexpected: names that transformers reported, stored ones or its own for them.
        manifest: the `compression.json` of the export.
    """
    entries = read_json(manifest) if manifest.is_file() else {}
    names = entries.get("carried", {}).get("names", ()) if isinstance(entries, dict) else ()
    own = own_names(model, names)
    return sorted(set(unexpected) - own.keys() - set(own.values()))


def note_left_out(
    model: Any,
    tensors: Mapping[str, StoredTensor],
    unexpected: Iterable[str],
    folder: Path | None = None,
) -> None:
    """Note on a model of transformers which tensors of its checkpoint it does not have.

    Args:
        model: as it was loaded.
        tensors: of the checkpoint, by their stored names; empty where they are not known.
        unexpected: names that transformers reported, which may be its own for stored ones.
        folder: of the checkpoint.
    """
    reported, known = set(unexpected), set(model.state_dict())
    layers = {n for n, _ in model.named_modules() if re.search(r"\.\d+$", n)}
    names = set() if tensors else reported
    for name, own in own_names(model, tensors).items():
        # inside a layer that the model has, what is dropped in silence is a buffer of old versions
        if not {name, own} & known and (own in reported or not _within(own, layers)):
            names.add(name)
    stored = {name: tensors[name] for name in sorted(names) if name in tensors}
    entries = expert_entries(model.config)
    setattr(model, _ATTRIBUTE, LeftOut(tuple(sorted(names)), stored, folder, entries))


def left_out_of(model: Any) -> LeftOut:
    """Return what the model's checkpoint has and the model has not."""
    left_out: LeftOut = getattr(model, _ATTRIBUTE, NOTHING)
    return left_out


def parts_of(names: Iterable[str]) -> dict[str, int]:
    """Return the number of tensors below each part of a model, such as `model.layers.61`."""
    parts: Counter[str] = Counter()
    for name in names:
        path = name.split(".")
        parts[".".join(path[: 3 if path[1:2] == ["layers"] else 2])] += 1
    return dict(parts)


def part_counts(names: Iterable[str]) -> str:
    """Return the parts as words: `model.visual (21), mtp.layers (17)`."""
    return ", ".join(f"{part} ({count})" for part, count in parts_of(names).items())


def is_sense(name: str) -> bool:
    """Return whether a tensor belongs to the tower of another sense."""
    return _SENSES.search(name) is not None


def is_claim(name: str) -> bool:
    """Return whether an entry of a config counts layers for further tokens."""
    return _CLAIMS.search(name) is not None


def misfits(left_out: LeftOut, config: Any) -> dict[str, str]:
    """Return the reason for each tensor that cannot be carried over unchanged.

    What is not of another sense stays or goes together: half of a further layer is none.

    Args:
        left_out: of the parent.
        config: that is written, of transformers.
    """
    names = set(left_out.names)
    towers = {name for name in names if is_sense(name)}
    reasons: dict[str, str] = {}
    for group in (towers, names - towers):
        if reason := _misfit(group, left_out, {} if group is towers else expert_entries(config)):
            reasons |= dict.fromkeys(group, reason)
    return reasons


def _misfit(group: set[str], left_out: LeftOut, entries: Mapping[str, int]) -> str | None:
    """Return why a group of tensors cannot be carried over, None where it can be.

    Args:
        group: names.
        left_out: of the parent.
        entries: what the written config says of experts that the group may have.
    """
    if absent := sorted(group - left_out.tensors.keys()):
        return f"{absent[0]} lies in no safetensors file"
    packed = (n for n in sorted(group) if is_packed_tensor(n, left_out.tensors[n]))
    if name := next(packed, None):
        return f"{name} is packed, and the export holds plain floats"
    own = next(filter(_EXPERTS.search, sorted(group)), None)
    for entry, before in left_out.experts.items():
        if own and (after := entries.get(entry, before)) != before:
            return f"{own} is made for {entry}={before}, and the written config has {after}"
    return None


def withdraw_claims(config: Any, names: Iterable[str]) -> None:
    """Let a config claim no layers for further tokens when their tensors are not there, in place.

    Args:
        config: of transformers.
        names: tensors that are not there.
    """
    if all(map(is_sense, names)):
        return
    for owner in config_owners(config):
        for name, value in list(owner.to_dict().items()):
            if is_claim(name) and isinstance(value, int | list):
                setattr(owner, name, type(value)())


def _within(name: str, layers: set[str]) -> bool:
    """Return whether a tensor belongs to a layer that the model has."""
    path = name.split(".")
    return any(".".join(path[:depth]) in layers for depth in range(1, len(path)))
