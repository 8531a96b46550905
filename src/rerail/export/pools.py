"""Whole experts of one layer, or of layers that share some, each of them stored once."""

import functools
import hashlib
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from rerail.experts.base import BankSpec, ExpertBank, StoredForm


class Pool:
    """Stored experts of some layers.

    Attributes:
        owner: index of the first of the layers.
        shared: whether there are several.
        slots: for each layer, the stored expert that answers each router row.
    """

    def __init__(self, banks: Mapping[int, ExpertBank]):
        self.owner, self.shared = min(banks), len(banks) > 1
        self.slots: dict[int, list[int]] = {}
        places: dict[Hashable, int] = {}
        self._picked: list[dict[str, Tensor]] = []
        for index, bank in sorted(banks.items()):
            dense, slots = bank.dense(), bank.slots.tolist()
            place: dict[int, int] = {}
            for row in sorted(set(slots)):
                expert = {name: tensor.detach()[row] for name, tensor in dense.items()}
                key: Hashable = _content(expert) if self.shared else row
                place[row] = places.setdefault(key, len(self._picked))
                if place[row] == len(self._picked):
                    self._picked.append(expert)
            self.slots[index] = [place[row] for row in slots]

    @functools.cached_property
    def experts(self) -> dict[str, Tensor]:
        """Tensors by stock name, with one row for each stored expert."""
        names = self._picked[0]
        return {name: torch.stack([expert[name] for expert in self._picked]) for name in names}

    def stored_form(self, index: int) -> StoredForm:
        """Return what a checkpoint holds of a layer: the experts of the whole pool."""
        spec = BankSpec("dense", len(self._picked))
        return StoredForm(spec, self.slots[index], self.experts, {})


def pools_of(banks: Mapping[int, ExpertBank]) -> dict[int, Pool]:
    """Return the pool of each layer, by its index; all of the banks store whole experts."""
    groups: list[tuple[set[Hashable], dict[int, ExpertBank]]] = []
    for index, bank in banks.items():
        names, members = set(bank.stored()), {index: bank}
        for group in [group for group in groups if group[0] & names]:
            groups.remove(group)
            names, members = names | group[0], group[1] | members
        groups.append((names, members))
    return {index: pool for _, group in groups for pool in [Pool(group)] for index in group}


def _content(expert: Mapping[str, Tensor]) -> str:
    """Return a hash of an expert's bytes: equal experts of several layers are stored once."""
    total = hashlib.sha256()
    for name in sorted(expert):
        total.update(expert[name].cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()
