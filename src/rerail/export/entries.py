"""What the config of a compressed checkpoint says of its layers, checked before anything is built.

This file is part of every remote export, so it needs torch, `rerail.experts` and `rerail.moe` only.
"""

from collections.abc import Mapping
from types import NoneType
from typing import Any

import torch

from rerail.errors import InputError
from rerail.experts.base import BankSpec, bank_class
from rerail.moe.fused_experts import Dims

_LARGEST_COUNT = 2**31 - 1
_ENTRY_TYPES: dict[str, Any] = {
    **dict.fromkeys(("layer", "built", "rows", "experts", "pool"), int),
    **dict.fromkeys(("path", "router"), str),
    **dict.fromkeys(("slots", "banks"), list),
    "whole": bool,
    "kept": (list, NoneType),
}
_BANK_TYPES: dict[str, Any] = {
    "kind": str,
    "stored": int,
    **dict.fromkeys(("integers", "options", "tensors"), dict),
}


def check_entries(entries: Any) -> None:
    """Check types and names, for which no model is needed.

    Raises:
        InputError: an entry is lacking, or of another type.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError("config.rerail names no list of layers; fetch the checkpoint again")
    for entry in entries:
        _check_types(entry, entry, _ENTRY_TYPES)
        for bank in entry["banks"]:
            _check_types(entry, bank, _BANK_TYPES)
    for name in ("layer", "path"):
        if len({entry[name] for entry in entries}) < len(entries):
            raise InputError(f"config.rerail names a {name} twice; fetch the checkpoint again")


def check_entry(entry: Mapping[str, Any], dims: Dims, top_k: int) -> None:
    """Check one layer against the sizes of the stock experts that it is built on.

    Raises:
        InputError: a count, a row, a slot or a tensor does not fit.
    """
    rows, kept, slots, banks = (entry[name] for name in ("rows", "kept", "slots", "banks"))
    selectable = range(rows) if kept is None else kept
    sound = {
        "layer": entry["layer"] >= 0 and entry["pool"] >= 0,
        "built": entry["built"] == dims.experts,
        "rows": top_k <= rows <= dims.experts,
        "kept": list(selectable) == sorted(_below(selectable, rows)) and len(selectable) >= top_k,
        "banks": len(banks) > 0,
        "slots": len(slots) == rows and len(_below(slots, banks[0]["stored"] if banks else 0)) > 0,
        "experts": 1 <= entry["experts"] <= _LARGEST_COUNT,
        "whole": not entry["whole"] or (banks and banks[0]["stored"] == entry["experts"]),
    }
    if wrong := [name for name, fits in sound.items() if not fits]:
        raise misfit(entry, f"has {wrong[0]}={entry[wrong[0]]}")
    for bank in banks:
        _check_bank(entry, bank, dims._replace(experts=len(slots)))


def misfit(entry: Any, reason: str) -> InputError:
    """Return the sentence on a layer that cannot be built as the config says."""
    layer = entry.get("layer") if isinstance(entry, dict) else None
    shown = reason if len(reason) <= 200 else f"{reason[:200]}..."
    return InputError(f"config.rerail, layer {layer!r}, {shown}; fetch the checkpoint again")


def spec_of(bank: Mapping[str, Any], layer: int = 0, *, whole: bool = False) -> BankSpec:
    """Return the spec of a bank that `bank_entry` wrote down."""
    stored = range(bank["stored"]) if whole else ()
    members = tuple(((layer, expert, 1.0),) for expert in stored)
    integers = {n: tuple(v) if isinstance(v, list) else v for n, v in bank["integers"].items()}
    return BankSpec(bank["kind"], bank["stored"], members, integers, dict(bank["options"]))


def _check_types(entry: Any, node: Any, types: Mapping[str, Any]) -> None:
    if not isinstance(node, dict) or node.keys() != types.keys():
        raise misfit(entry, f"needs exactly {', '.join(types)}")
    for name, kind in types.items():
        if not isinstance(node[name], kind) or (kind is int and isinstance(node[name], bool)):
            raise misfit(entry, f"has {name}={str(node[name])[:80]!r}, which is of another type")


def _below(numbers: Any, end: int) -> set[int]:
    """Return the distinct numbers; nothing where one of them is no whole number below the end."""
    whole = all(type(number) is int and 0 <= number < end for number in numbers)
    return set(numbers) if whole else set()


def _check_bank(entry: Any, bank: Mapping[str, Any], dims: Dims) -> None:
    if not 1 <= bank["stored"] <= _LARGEST_COUNT:
        raise misfit(entry, f"has stored={bank['stored']}")
    for name, value in bank["integers"].items():
        numbers = value if isinstance(value, list) else [value]
        if len(_below(numbers, _LARGEST_COUNT)) == 0:
            raise misfit(entry, f"has {name}={value}")
    if not all(isinstance(option, str) for option in bank["options"].values()):
        raise misfit(entry, f"has options={bank['options']}")
    asked = bank_class(bank["kind"]).shapes(spec_of(bank), dims)
    given = {name: tuple(shape) for name, (_, shape) in bank["tensors"].items()}
    if asked != given:
        raise misfit(entry, f"needs the tensors {asked} and names {given}")
    for dtype, _ in bank["tensors"].values():
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise misfit(entry, f"names a tensor of dtype {dtype!r}")
