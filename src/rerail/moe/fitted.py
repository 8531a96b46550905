"""Numbers that were fitted on a router say on which one, and are refused on any other."""

import hashlib

from rerail.errors import InputError
from rerail.moe.model import MoELayer
from rerail.moe.router import rows_of


def router_hash(layer: MoELayer) -> str:
    """Return 16 hex digits for all that a router holds per expert: rows, biases and masks.

    Values count, not the dtype that holds them.
    """
    found = hashlib.sha256()
    for owner, deep in ((layer.router, True), (layer.block, False)):
        for _, name, tensor, _ in rows_of(owner, layer.num_experts, recurse=deep):
            found.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def check_router(layer: MoELayer, fitted_on: str) -> None:
    """Check that numbers were fitted on this router; an empty hash and the meta device pass.

    Raises:
        InputError: they were fitted on another one.
    """
    if not fitted_on or layer.router_rows.is_meta:
        return
    if (found := router_hash(layer)) != fitted_on:
        raise InputError(
            f"layer {layer.index}: its skipping policy was fitted on the router {fitted_on}, and "
            f"this one is {found}; fit it again on this router, or set compressor.allow_stale=true"
        )
