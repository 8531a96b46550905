"""How much attention each token receives, for banks that decide token by token."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rerail.moe.model import MoELayer


class Received:
    """A hook on an attention module: hands the bank beside it what each token receives.

    It looks the bank up at every forward, so that a copy of the model hands to its own bank and a
    bank that was swapped out is forgotten.
    """

    def __init__(self, block: nn.Module):
        self.block = block

    def __call__(self, module: nn.Module, args: Any, named: Mapping[str, Any], output: Any) -> None:
        """Take the attention map out of the module's output, where there is one."""
        bank: Any = self.block.experts
        maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if getattr(bank, "watches", False) and isinstance(maps, Tensor):
            bank.received = received(maps.detach(), named.get("attention_mask"))


def received(maps: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mean attention that each key gets from its own and later queries, and who counts.

    Args:
        maps: (B, heads, Q, S) attention weights, each query's summing to one over the keys.
        mask: (B, 1, Q, S) added to the scores, or true where a query may look; None for no padding.

    Returns:
        float32 (B, Q) sum_{i >= j} A_ij / (number of i >= j), heads averaged, padded queries left
        out; and bool (B, Q), false for padding. Where keys lie in a cache (Q < S), a token has no
        later queries yet, and no token counts.
    """
    by_query = maps.float().mean(dim=1)
    batch, queries, keys = by_query.shape
    valid = torch.ones(batch, queries, dtype=torch.bool, device=maps.device)
    if queries < keys:
        return torch.zeros(batch, queries, device=maps.device), ~valid
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        valid = seen.any(dim=1).any(dim=1)[:, :keys].expand(batch, keys)
    gets = (by_query * valid.unsqueeze(2)).sum(dim=1)
    later = valid.flip(1).cumsum(dim=1).flip(1)
    return gets / later.clamp(min=1), valid


def watch_attention(model: nn.Module, layers: Iterable[MoELayer]) -> None:
    """Let banks that watch see the attention of their decoder layer, and make it be computed.

    Only eager attention has its weights in memory, so the model is switched to it.
    """
    for layer in layers:
        if not getattr(layer.experts, "watches", False):
            continue
        attention = getattr(model.get_submodule(layer.name.rpartition(".")[0]), "self_attn", None)
        if attention is None or any(
            isinstance(hook, Received) for hook in attention._forward_hooks.values()
        ):
            continue
        attention.register_forward_hook(Received(layer.block), with_kwargs=True)
        model.set_attn_implementation("eager")  # type: ignore[operator]
