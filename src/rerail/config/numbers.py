"""A number in the place of a preset: `ratio=0.5`, `ratio=4` (bits), `skip=0.25`, `samples=64`."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import yaml

from rerail.config.presets import config_root

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_AS_BITS = re.compile(rf"(?:bits?)?({_NUMBER})(?:-?bits?)?", re.I)
_GROUPS = ("ratio", "skip", "samples")
_WORD = re.compile(rf"({'|'.join(_GROUPS)})=(.+)", re.S)


def quoted(word: str) -> str:
    """Return an override with its numbers quoted: Hydra takes words only as choices of a group."""
    if not (typed := _WORD.fullmatch(word)):
        return word
    group, choices = typed.groups()
    each = [f"'{one}'" if re.fullmatch(_NUMBER, one, re.I) else one for one in choices.split(",")]
    return f"{group}={','.join(each)}"


def unquoted(word: str) -> str:
    """Return an override as a person types it: `quoted` backwards."""
    return re.sub(rf"'({_NUMBER})'", r"\1", word, flags=re.I) if _WORD.fullmatch(word) else word


def node(path: str) -> Mapping[str, Any] | None:
    """Return what a number means, as a preset of that name would hold it; None for other names.

    A ratio is the removed share below 1, and average bits from 1 on or with `bit` beside it.

    Args:
        path: of the preset below conf/, as in `ratio/0.5`.
    """
    group, _, name = path.removesuffix(".yaml").partition("/")
    typed = _AS_BITS.fullmatch(name) if group in _GROUPS else None
    if typed is None:
        return None
    bits = "bit" in name.lower()
    value = yaml.safe_load(typed[1]) if group == "samples" else float(typed[1])
    if group == "ratio":
        kind, field = ("Bits", "average") if bits or value >= 1 else ("Ratio", "removed")
        return {"_target_": f"rerail.plan.budget.{kind}", field: value}
    if bits:
        return None
    return {"count": value} if group == "samples" else {**_SKIP, "share": value}


_SKIP = {"_target_": "rerail.plan.budget.Skip"}


def preset_name(group: str, name: str) -> str:
    """Return the name of the preset that holds the same as a number: one choice has one name."""
    made = node(f"{group}/{name}")
    same = [known for known, content in _presets(group).items() if made and content == made]
    return same[0] if same else name


@functools.cache
def _presets(group: str) -> dict[str, Any]:
    files = sorted((config_root() / "conf" / group).glob("*.yaml"))
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}
