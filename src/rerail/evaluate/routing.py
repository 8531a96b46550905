"""How far routing moved: which slots each token chose, and how evenly experts are loaded."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rerail.moe.model import MoELayer, MoEModel


@dataclass
class Routing:
    """Chosen slots of every valid token, layer by layer.

    Attributes:
        chosen: layer index -> list of int16 (T, K), each row ascending.
        rows: layer index -> number of router rows.
        mask: (B, S) of the batch in flight.
    """

    chosen: dict[int, list[Tensor]] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    mask: Tensor | None = None

    def of(self, layer: int) -> Tensor:
        """Return (T, K) for a layer."""
        return torch.cat(self.chosen[layer])

    def load(self, layer: int) -> Tensor:
        """Return the share of all choices that each slot has, float64 (rows,); it sums to 1."""
        chosen = self.of(layer).flatten().long()
        return torch.bincount(chosen, minlength=self.rows[layer]).double() / len(chosen)

    def load_entropy(self, layer: int) -> float:
        """Return the entropy of the slots' shares of choices over log(rows).

        1 is an even load, 0 is one slot for all tokens.
        """
        entropy = torch.special.entr(self.load(layer)).sum()
        return float(entropy / torch.tensor(float(max(self.rows[layer], 2))).log())


def _recorder(layer: MoELayer, routing: Routing) -> Any:
    """Return a forward pre-hook for a layer's experts (or bank)."""
    routing.chosen[layer.index] = []
    routing.rows[layer.index] = layer.num_experts

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        index = inputs[1]
        if routing.mask is not None:
            index = index[routing.mask.flatten().to(index.device)]
        routing.chosen[layer.index].append(index.sort(dim=1).values.to(torch.int16).cpu())

    return record


@contextlib.contextmanager
def tracing(model: MoEModel) -> Iterator[Routing]:
    """Record the choices of every forward inside the block."""
    routing = Routing()
    hooks = [
        layer.experts.register_forward_pre_hook(_recorder(layer, routing)) for layer in model.layers
    ]
    try:
        yield routing
    finally:
        for hook in hooks:
            hook.remove()
        routing.mask = None


def changed(
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
        mine = _slots(student, layer, kept)[student.of(layer).long()].sort(dim=1).values
        shares[layer] = float((mine != teacher.of(layer).long()).any(dim=1).double().mean())
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
    for slot, share in zip(_slots(student, layer, kept), student.load(layer), strict=True):
        load[int(slot)] = round(float(share), 6)
    return load


def _slots(student: Routing, layer: int, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    """Return the teacher's slot behind each of a student's rows, int64 (rows,)."""
    rows = student.rows[layer]
    if layer in kept and len(kept[layer]) == rows:
        return torch.tensor(kept[layer])
    return torch.arange(rows)
