"""Plans: which router slots stay, which stored expert answers each, in which form. Plain data."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor

from rerail.errors import InputError
from rerail.files import digest, file_digest, read_sealed, whole_file, write_sealed
from rerail.moe.bank import BankSpec
from rerail.moe.layer import MoELayer

RouterPolicy = Literal["untouched", "slice", "mask"]


@dataclass(frozen=True)
class LayerPlan:
    """The decision about one MoE layer.

    Attributes:
        layer: index of the decoder layer.
        kept: router slots that can still be selected, ascending, in the teacher's numbering.
        slots: for each router row of the student, the stored expert that answers it.
        router: `untouched` (E rows), `slice` (the kept rows only) or `mask` (E rows, others never chosen).
        bank: the stored form.
    """

    layer: int
    kept: tuple[int, ...]
    slots: tuple[int, ...]
    router: RouterPolicy
    bank: BankSpec


@dataclass(frozen=True)
class Plan:
    """All decisions about a model, with their lineage; solved tensors travel beside it.

    Attributes:
        layers: one entry per changed layer; a layer that is not named stays as it is.
        lineage: how the plan came about (method, ratio, statistics); JSON-able.
        tensors: solved tensors, named `layers.<index>.<name>`.
    """

    layers: tuple[LayerPlan, ...] = ()
    lineage: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain data (without the tensors)."""
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        return {"layers": layers, "lineage": dict(self.lineage)}

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> "Plan":
        """Inverse of `to_json`, also after a trip through text."""
        layers = tuple(_layer_from(entry) for entry in data["layers"])
        return cls(layers, dict(data["lineage"]), dict(tensors or {}))

    def save(self, path: Path) -> None:
        """Write `path` (JSON with its hash) and, where tensors were solved for, a safetensors file."""
        content = self.to_json()
        if self.tensors:
            beside = path.with_suffix(".safetensors")
            with whole_file(beside) as temporary:
                save_file({k: t.contiguous() for k, t in self.tensors.items()}, temporary)
            content["tensors_sha256"] = file_digest(beside)
        write_sealed(path, content)

    @classmethod
    def load(cls, path: Path) -> "Plan | None":
        """Read a plan; None where the file or its tensors are absent or damaged."""
        content = read_sealed(path)
        if content is None:
            return None
        beside = path.with_suffix(".safetensors")
        tensors: dict[str, Tensor] = {}
        if expected := content.get("tensors_sha256"):
            if not beside.exists() or file_digest(beside) != expected:
                return None
            tensors = load_file(beside)
        return cls.from_json(content, tensors)

    def of_layer(self, index: int) -> dict[str, Tensor]:
        """Return the solved tensors of a layer under their short names."""
        prefix = f"layers.{index}."
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}

    def fingerprint(self) -> str:
        """Return a hash of the decisions, not of the lineage."""
        return digest(json.loads(json.dumps(self.to_json()["layers"])))

    def validate(self, layers: tuple[MoELayer, ...]) -> None:
        """Check the plan against a model (one on the meta device will do).

        Raises:
            InputError: a layer or slot does not exist, too few rows are selectable for top-k, or a
                grouped router would break.
        """
        known = {layer.index: layer for layer in layers}
        for part in self.layers:
            if part.layer not in known:
                raise InputError(
                    f"plan names layer {part.layer}; the MoE layers are {sorted(known)}"
                )
            _validate_layer(part, known[part.layer])


def _layer_from(entry: Mapping[str, Any]) -> LayerPlan:
    bank = dict(entry["bank"])
    members = tuple(tuple((int(e), float(w)) for e, w in group) for group in bank["members"])
    bank |= {"members": members, "tensors": tuple(bank["tensors"])}
    kept, slots = tuple(entry["kept"]), tuple(entry["slots"])
    return LayerPlan(entry["layer"], kept, slots, entry["router"], BankSpec(**bank))


def _validate_layer(part: LayerPlan, layer: MoELayer) -> None:
    where = f"layer {part.layer}"
    if list(part.kept) != sorted(set(part.kept)) or not set(part.kept) <= set(
        range(layer.num_experts)
    ):
        raise InputError(
            f"{where}: kept slots must be distinct, ascending and below {layer.num_experts}"
        )
    if len(part.kept) < layer.top_k:
        raise InputError(
            f"{where}: {len(part.kept)} selectable router rows are fewer than top_k = {layer.top_k}; "
            f"keep at least {layer.top_k} of {layer.num_experts}"
        )
    rows = len(part.kept) if part.router == "slice" else layer.num_experts
    if len(part.slots) != rows or not set(part.slots) <= set(range(part.bank.stored)):
        raise InputError(
            f"{where}: {rows} slots must map to stored experts below {part.bank.stored}"
        )
    if layer.num_groups > 1 and part.router == "slice":
        _validate_groups(part, layer)
    if layer.num_groups > 1 and part.router == "mask":
        _validate_choice(part, layer)


def _per_group(kept: tuple[int, ...], layer: MoELayer) -> list[int]:
    size = layer.num_experts // layer.num_groups
    return [sum(slot // size == g for slot in kept) for g in range(layer.num_groups)]


def _validate_groups(part: LayerPlan, layer: MoELayer) -> None:
    counts = _per_group(part.kept, layer)
    if len(set(counts)) > 1:
        raise InputError(
            f"layer {part.layer}: slicing a router of {layer.num_groups} groups must keep the same number "
            f"in each, not {counts}; use allocation.per_group=true or router=mask"
        )
    _validate_choice(part, layer)


def _validate_choice(part: LayerPlan, layer: MoELayer) -> None:
    counts = sorted(_per_group(part.kept, layer))
    if counts[0] < 2 or sum(counts[: layer.top_k_groups]) < layer.top_k:
        raise InputError(
            f"layer {part.layer}: kept per group {counts} leaves {layer.top_k_groups} groups without "
            f"{layer.top_k} experts to choose; keep at least 2 a group and top_k in any chosen groups"
        )
