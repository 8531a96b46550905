"""What a plan must hold to fit a model: one sentence for each way in which it does not."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from rerail.errors import InputError
from rerail.experts.base import bank_class
from rerail.moe.model import MoELayer

if TYPE_CHECKING:
    from rerail.plan.plan import LayerPlan

Layers = Mapping[int, MoELayer]


def validate_names(named: Sequence[int], known: Layers) -> None:
    """Check that every named layer exists and is named once."""
    for index in named:
        if index not in known:
            raise InputError(f"plan names layer {index}; the MoE layers are {sorted(known)}")
        if named.count(index) > 1:
            raise InputError(
                f"plan names layer {index} {named.count(index)} times; once is allowed"
            )


def validate_layer(part: "LayerPlan", known: Layers, tensors: Mapping[str, Tensor]) -> None:
    """Check one layer's decision against the model and the solved tensors.

    Raises:
        InputError: the sentence that says what does not fit.
    """
    layer = known[part.layer]
    _validate_kept(part, layer)
    _validate_slots(part, layer)
    _validate_members(part, known)
    _validate_tensors(part, layer, tensors)
    layer.check_router(part.bank.options.get("router", ""))
    if layer.num_groups > 1 and part.router != "untouched":
        _validate_groups(part, layer)


def _validate_kept(part: "LayerPlan", layer: MoELayer) -> None:
    experts, where = layer.num_experts, f"layer {part.layer}"
    if list(part.kept) != sorted(set(part.kept) & set(range(experts))):
        raise InputError(
            f"{where}: kept slots {list(part.kept)} must be distinct, ascending and below {experts}"
        )
    if part.router not in ("untouched", "slice", "mask", "pooled"):
        raise InputError(
            f"{where}: router policy {part.router!r} is not known; allowed: untouched, slice, "
            "mask, pooled"
        )
    if part.router == "untouched" and len(part.kept) != experts:
        raise InputError(
            f"{where}: router policy 'untouched' keeps all {experts} slots, not {len(part.kept)}; "
            "use slice or mask"
        )
    if len(part.kept) < layer.top_k:
        raise InputError(
            f"{where}: {len(part.kept)} selectable router rows are fewer than top_k = "
            f"{layer.top_k}; keep at least {layer.top_k} of {experts}"
        )


def _validate_slots(part: "LayerPlan", layer: MoELayer) -> None:
    rows = len(part.kept) if part.router in ("slice", "pooled") else layer.num_experts
    inside = all(type(slot) is int and 0 <= slot < part.bank.stored for slot in part.slots)
    if len(part.slots) != rows or not inside:
        raise InputError(
            f"layer {part.layer}: {rows} slots must map to stored experts below "
            f"{part.bank.stored}, not {list(part.slots)}"
        )


def _validate_members(part: "LayerPlan", known: Layers) -> None:
    bank, where = part.bank, f"layer {part.layer}"
    if len(bank.members) != (bank.stored if bank.kind == "dense" else 0):
        raise InputError(
            f"{where}: a bank of kind {bank.kind!r} with {bank.stored} stored experts has "
            f"{len(bank.members)} entries of members; dense banks need one each, others none"
        )
    for group in bank.members:
        if not group or not all(math.isfinite(weight) for _, _, weight in group):
            raise InputError(f"{where}: members {group} must be some, with finite weights")
        for source, expert, _ in group:
            if source not in known or not 0 <= expert < known[source].num_experts:
                raise InputError(
                    f"{where}: member expert {expert} of layer {source} does not exist"
                )
            if known[source].dims.numbers != known[part.layer].dims.numbers:
                raise InputError(
                    f"{where}: experts of layer {source} have another size and cannot be shared"
                )


def _validate_tensors(part: "LayerPlan", layer: MoELayer, tensors: Mapping[str, Tensor]) -> None:
    expected = bank_class(part.bank.kind).shapes(part.bank, layer.dims)
    if part.router == "pooled":
        expected = expected | {"router.rows": (len(part.kept), layer.router_rows.shape[1])}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        raise InputError(
            f"layer {part.layer}: a bank of kind {part.bank.kind!r} needs the tensors {expected}, "
            f"not {shapes}"
        )


def _validate_groups(part: "LayerPlan", layer: MoELayer) -> None:
    size = layer.num_experts // layer.num_groups
    counts = [sum(slot // size == g for slot in part.kept) for g in range(layer.num_groups)]
    if part.router != "mask" and len(set(counts)) > 1:
        raise InputError(
            f"layer {part.layer}: slicing a router of {layer.num_groups} groups must keep the same "
            f"number in each, not {counts}; keep equal numbers or use router=mask"
        )
    fewest = sorted(counts)[: layer.top_k_groups]
    if fewest[0] < 2 or sum(fewest) < layer.top_k:
        raise InputError(
            f"layer {part.layer}: kept per group {counts} leaves {layer.top_k_groups} groups "
            f"without {layer.top_k} experts to choose; keep at least 2 a group and top_k in any "
            "chosen groups"
        )
