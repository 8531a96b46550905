"""Whole experts of one layer, or of layers that share some, each of them stored once."""

import hashlib
from collections.abc import Hashable, Iterable, Mapping

import torch
from torch import Tensor

from rerail.experts.base import ExpertBank
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer


class Pool:
    """Stored experts of some layers.

    Attributes:
        owner: index of the first of the layers.
        shared: whether there are several.
        experts: tensors by stock name, with leading axis `size`.
        size: how many experts there are.
    """

    def __init__(self, layers: list[MoELayer]):
        self.owner, self.shared = layers[0].index, len(layers) > 1
        self._place: dict[tuple[int, int], int] = {}
        found: dict[Hashable, int] = {}
        picked: list[dict[str, Tensor]] = []
        for layer in layers:
            slots, dense = answers(layer)
            for row in sorted(set(slots)):
                expert = {name: tensor[row] for name, tensor in dense.items()}
                key: Hashable = _content(expert) if self.shared else row
                if found.setdefault(key, len(picked)) == len(picked):
                    picked.append(expert)
                self._place[layer.index, row] = found[key]
        self.size = len(picked)
        self.experts = {name: torch.stack([e[name] for e in picked]) for name in picked[0]}

    def slots(self, layer: MoELayer) -> list[int]:
        """Return the stored expert that answers each router row of a layer."""
        return [self._place[layer.index, row] for row in answers(layer)[0]]


def answers(layer: MoELayer) -> tuple[list[int], Mapping[str, Tensor]]:
    """Return the row that answers each router row, and the tensors that have these rows."""
    bank = layer.experts
    if isinstance(bank, ExpertBank):
        return bank.slots.tolist(), {n: t.detach() for n, t in bank.dense().items()}
    held = expert_parameters(bank)
    return list(range(layer.num_experts)), {n: p.detach() for n, p in held.items()}


def pools_of(layers: Iterable[MoELayer]) -> dict[int, Pool]:
    """Return the pool of each of these layers, which all store whole experts."""
    groups: list[tuple[set[Hashable], list[MoELayer]]] = []
    for layer in layers:
        names, members = set(layer.stored()), [layer]
        sharing = [group for group in groups if group[0] & names]
        for held, group in sharing:
            names, members = names | held, [*group, *members]
        groups = [group for group in groups if group not in sharing]
        groups.append((names, sorted(members, key=lambda part: part.index)))
    found: dict[int, Pool] = {}
    for _, members in groups:
        pool = Pool(members)
        found |= {layer.index: pool for layer in members}
    return found


def _content(expert: Mapping[str, Tensor]) -> str:
    """Return a hash of an expert's bytes: equal experts of several layers are stored once."""
    found = hashlib.sha256()
    for name in sorted(expert):
        found.update(expert[name].cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
