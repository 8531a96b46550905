"""How far routing moved, how evenly experts are loaded, and how many are computed."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rerail.experts.base import bank_of
from rerail.moe.model import MoELayer, MoEModel


@dataclass
class Routing:
    """Chosen slots of every valid token, layer by layer.

    Attributes:
        chosen: layer index -> list of int16 (T, K), each row ascending.
        mass: layer index -> list of float64 (slots,), the gate weights that each slot got.
        num_slots: layer index -> number of router rows.
        computed: layer index -> experts computed for all these tokens together.
        mask: (B, S), true at real tokens of the batch that runs now; None where all are.
    """

    chosen: dict[int, list[Tensor]] = field(default_factory=dict)
    num_slots: dict[int, int] = field(default_factory=dict)
    mass: dict[int, list[Tensor]] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)
    mask: Tensor | None = None

    def slots(self, layer: int) -> Tensor:
        """Return the chosen slots of a layer, int16 (T, K)."""
        return torch.cat(self.chosen[layer])

    def active_experts(self, layer: int) -> float:
        """Return the experts computed for a token, on average: below K where slots are skipped."""
        tokens = sum(map(len, self.chosen[layer]))
        return self.computed[layer] / max(1, tokens)

    @property
    def mean_active_experts(self) -> float:
        """The mean over the layers."""
        return sum(map(self.active_experts, self.computed)) / len(self.computed)

    def load(self, layer: int) -> Tensor:
        """Return the share of all choices that each slot has, float64 (slots,); it sums to 1."""
        chosen = self.slots(layer).flatten().long()
        return torch.bincount(chosen, minlength=self.num_slots[layer]).double() / len(chosen)

    def share_of(self, layer: int, rows: Tensor) -> tuple[float, float]:
        """Return the share of all choices, and of all gate weight, of some slots, bool (slots,)."""
        mass = torch.stack(self.mass[layer]).sum(dim=0)
        choices, gates = (float(x[rows].sum() / x.sum()) for x in (self.load(layer), mass))
        return choices, gates

    def load_entropy(self, layer: int) -> float:
        """Return the entropy of the slots' shares of choices over log(slots).

        1 is an even load, 0 is one slot for all tokens.
        """
        entropy = torch.special.entr(self.load(layer)).sum()  # entr(0) is 0, log would be -inf
        return float(entropy / torch.tensor(float(max(self.num_slots[layer], 2))).log())


class _LayerHooks:
    """Hooks on a layer's experts (or bank) that fill in a `Routing`."""

    def __init__(self, layer: MoELayer, routing: Routing):
        self.layer, self.routing = layer.index, routing
        routing.chosen[layer.index] = []
        routing.mass[layer.index] = []
        routing.num_slots[layer.index] = layer.num_experts
        routing.computed[layer.index] = 0
        before = layer.experts.register_forward_pre_hook(self._record_choices)
        after = layer.experts.register_forward_hook(self._count_computed)
        self.handles = (before, after)

    def _of_real_tokens(self, values: Tensor) -> Tensor:
        mask = self.routing.mask
        return values if mask is None else values[mask.flatten().to(values.device)]

    def _record_choices(self, experts: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        index = self._of_real_tokens(inputs[1])
        # sorted, so that equal sets are equal rows; int16, as a text has millions of choices
        rows = index.sort(dim=1).values.to(torch.int16).cpu()
        self.routing.chosen[self.layer].append(rows)
        gates = self._of_real_tokens(inputs[2]).double().flatten()
        mass = gates.new_zeros(self.routing.num_slots[self.layer])
        self.routing.mass[self.layer].append(mass.index_add_(0, index.flatten(), gates).cpu())

    def _count_computed(
        self, experts: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        index, active = inputs[1], bank_of(experts).active  # known after the forward
        if active is None:  # this form skips nothing
            active = index.new_full((len(index),), index.shape[1])
        self.routing.computed[self.layer] += int(self._of_real_tokens(active).sum())


@contextlib.contextmanager
def record_routing(model: MoEModel) -> Iterator[Routing]:
    """Record the choices of every forward inside the block."""
    routing = Routing()
    hooks = [_LayerHooks(layer, routing) for layer in model.layers]
    try:
        yield routing
    finally:
        for handle in (handle for layer in hooks for handle in layer.handles):
            handle.remove()
        routing.mask = None


def routing_changed(
    teacher: Routing, student: Routing, kept: Mapping[int, tuple[int, ...]]
) -> dict[int, float]:
    """Return, for each layer, the share of tokens whose chosen set is not the teacher's.

    Args:
        teacher: the original model's choices.
        student: the student's, on the same tokens.
        kept: for sliced routers, the teacher's slot behind each of the student's rows.
    """
    shares = {}
    for layer in teacher.chosen:
        # the student's rows as the teacher's slots; these may not ascend, so sort again
        mapped = _teacher_slots(student, layer, kept)[student.slots(layer).long()]
        differs = mapped.sort(dim=1).values != teacher.slots(layer).long()
        shares[layer] = float(differs.any(dim=1).double().mean())
    return shares


def load_by_expert(
    student: Routing, layer: int, kept: Mapping[int, tuple[int, ...]], experts: int
) -> list[float | None]:
    """Return each of the teacher's slots' share of a student's choices; None where it is gone.

    Args:
        student: its choices.
        layer: one of its layers.
        kept: for sliced routers, the teacher's slot behind each of the student's rows.
        experts: number of the teacher's slots.
    """
    load: list[float | None] = [None] * experts
    for slot, share in zip(_teacher_slots(student, layer, kept), student.load(layer), strict=True):
        load[int(slot)] = round(float(share), 6)
    return load


def _teacher_slots(student: Routing, layer: int, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    """Return the teacher's slot behind each of a student's router rows, int64 (slots,)."""
    num_slots = student.num_slots[layer]
    if layer in kept and len(kept[layer]) == num_slots:
        return torch.tensor(kept[layer])
    return torch.arange(num_slots)
