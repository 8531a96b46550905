"""How much attention each token receives, for banks that decide token by token."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rerail.experts.base import bank_of
from rerail.moe.families import attention_of, decoder_layer, experts_of


class AttentionHook:
    """A hook on an attention module: hands the bank beside it what each token receives.

    It looks the bank up at every forward, so that a copy of the model hands to its own bank and a
    bank that was swapped out is forgotten.
    """

    def __init__(self, block: nn.Module):
        self.block = block

    def __call__(self, module: nn.Module, args: Any, named: Mapping[str, Any], output: Any) -> None:
        """Take the attention map out of the module's output, where there is one."""
        bank = bank_of(experts_of(self.block))
        maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if bank.watches and isinstance(maps, Tensor):
            bank.received = attention_received(maps.detach(), named.get("attention_mask"))


def attention_received(maps: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
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
    # decoding with a cache
    if queries < keys:
        return torch.zeros(batch, queries, device=maps.device), ~valid
    if mask is not None:
        # an additive mask has the dtype's least number (or sums with it) where nobody may look
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        valid = seen.any(dim=1).any(dim=1)[:, :keys].expand(batch, keys)
    gets = (by_query * valid.unsqueeze(2)).sum(dim=1)
    # for each position the number of valid ones from it on
    later = valid.flip(1).cumsum(dim=1).flip(1)
    return gets / later.clamp(min=1), valid


def watch_attention(model: Any, blocks: Mapping[str, nn.Module]) -> None:
    """Let banks that watch see the attention of their decoder layer, and make it be computed.

    Only eager attention has its weights in memory, so the model is switched to it.

    Args:
        model: a transformers model.
        blocks: MoE blocks by their path in it.
    """
    for path, block in blocks.items():
        attention = attention_of(decoder_layer(model, path))
        if attention is None or not bank_of(experts_of(block)).watches:
            continue
        # a copy of a watched model brings its hook along
        if not any(isinstance(hook, AttentionHook) for hook in attention._forward_hooks.values()):
            attention.register_forward_hook(AttentionHook(block), with_kwargs=True)
            model.set_attn_implementation("eager")
