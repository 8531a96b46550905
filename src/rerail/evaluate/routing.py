"""How far routing moved: which slots each token chose, and how evenly experts are loaded."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rerail.moe.layer import MoELayer, MoEModel


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

    def load_entropy(self, layer: int) -> float:
        """Return the entropy of the slots' shares of choices over log(rows): 1 is even, 0 is one slot."""
        counts = torch.bincount(
            self.of(layer).flatten().long(), minlength=self.rows[layer]
        ).double()
        share = counts / counts.sum()
        entropy = -(share * share.clamp(min=1e-300).log()).sum()
        return float(entropy / torch.tensor(float(self.rows[layer])).log().clamp(min=1e-12))


class _Tracer(nn.Module):
    def __init__(self, layer: MoELayer, routing: Routing):
        super().__init__()
        self.inner = layer.experts
        self.index = layer.index
        self.routing = routing
        routing.chosen[layer.index] = []
        routing.rows[layer.index] = layer.num_experts

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        mask = self.routing.mask
        kept = index if mask is None else index[mask.flatten().to(index.device)]
        self.routing.chosen[self.index].append(kept.sort(dim=1).values.to(torch.int16).cpu())
        out: Tensor = self.inner(hidden, index, weights)
        return out


@contextlib.contextmanager
def tracing(model: MoEModel) -> Iterator[Routing]:
    """Record the choices of every forward inside the block."""
    routing = Routing()
    tracers = [(layer, _Tracer(layer, routing)) for layer in model.layers]
    for layer, tracer in tracers:
        layer.swap(tracer)
    try:
        yield routing
    finally:
        for layer, tracer in tracers:
            layer.swap(tracer.inner)
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
        mine = student.of(layer).long()
        if layer in kept and len(kept[layer]) == student.rows[layer]:
            mine = torch.tensor(kept[layer])[mine].sort(dim=1).values
        shares[layer] = float((mine != teacher.of(layer).long()).any(dim=1).double().mean())
    return shares
