"""What a transformers class does not say about itself: one row per odd family.

Layout (transposed, interleaved, biased) is read from flags of the experts module, so a family
inside the seam needs no row. Families outside the seam are listed with the reason.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Traits:
    """Where a family keeps its router: the block's attribute, and the path to the rows (E, H)."""

    router: str
    rows: str = "weight"


_ODD: dict[str, Traits] = {
    "AfmoeSparseMoeBlock": Traits("router", "gate.weight"),
    "HunYuanMoEV1Moe": Traits("gate", "wg.weight"),
}

OUTSIDE_THE_SEAM = {
    "llama4": "its experts are called with routing already applied",
    "llama4_text": "its experts are called with routing already applied",
    "dbrx": "its experts hold two-dimensional fused matrices",
    "doge": "its experts are rows of an embedding",
    "jetmoe": "its attention is routed too",
    "longcat_flash": "its router has rows for identity experts",
    "nllb_moe": "it is an encoder-decoder with experts as a dictionary",
    "step3p7": "its experts take other arguments",
    "deepseek": "it needs remote code (deepseek-moe-16b-base is not in transformers 5.23)",
}


def traits_of(block: nn.Module) -> Traits | None:
    """Return where the block keeps its router, or None when it has none."""
    if odd := _ODD.get(type(block).__name__):
        return odd
    for name in ("gate", "router"):
        rows = getattr(getattr(block, name, None), "weight", None)
        if rows is not None and rows.dim() == 2:
            return Traits(name)
    return None
