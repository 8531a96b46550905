"""Dense form: whole experts, the model's own (slice, mask, alias) or sums of them (merge)."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from rerail.experts.base import BankParts, ExpertBank, Member
from rerail.moe.fused_experts import expert_parameters, shell_of


class DenseExperts(ExpertBank):
    """Whole experts: some of the model's own, or weighted sums of them.

    Where every stored expert is one of this layer's, the bank reads the layer's own Parameters
    through its slot map and no weight is copied; otherwise the stored experts are gathered.
    """

    def __init__(self, parts: BankParts):
        spec, stock = parts.spec, parts.stock
        own = all(len(g) == 1 and g[0][0] == parts.layer and g[0][2] == 1.0 for g in spec.members)
        if own:
            # slots point at the rows of the layer's own tensors, not at stored experts
            rows = [spec.members[slot][0][1] for slot in parts.slots]
            super().__init__(parts._replace(slots=rows))
            self.shell = shell_of(stock, {}, cast(int, stock.num_experts))
            return
        super().__init__(parts)
        read = {i: expert_parameters(parts.stocks[i]) for i in spec.reads()}
        gathered = {
            name: _gather(like, {i: fused[name] for i, fused in read.items()}, spec.members)
            for name, like in expert_parameters(stock).items()
        }
        self.shell = shell_of(stock, gathered, spec.stored)


def _gather(
    like: Tensor, stacks: Mapping[int, Tensor], members: tuple[tuple[Member, ...], ...]
) -> Tensor:
    """Return sum_e weight_e W_e for each stored expert, in float32 or wider, cast once."""
    wide = torch.promote_types(like.dtype, torch.float32)
    out = torch.empty((len(members), *like.shape[1:]), dtype=like.dtype, device=like.device)
    for row, group in enumerate(members):
        parts = [stacks[layer].detach()[expert].to(like.device) for layer, expert, _ in group]
        # bit for bit, and without a copy in the wider dtype
        if len(group) == 1 and group[0][2] == 1.0:
            out[row] = parts[0]
            continue
        total = torch.zeros(like.shape[1:], dtype=wide, device=like.device)
        for part, (_, _, weight) in zip(parts, group, strict=True):
            total += weight * part.to(wide)
        out[row] = total.to(like.dtype)
    return out
