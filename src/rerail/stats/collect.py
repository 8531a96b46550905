"""The passes: one forward of the text fills every statistic that was asked for.

The routed pass must leave the model's outputs as they are, to the bit. It asks the experts module
for each (token, choice) pair on its own with weight one, which costs the same matrix products, and
adds the gated pairs up in the order in which the module itself would have.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rerail.errors import InputError
from rerail.moe.bank import ExpertBank
from rerail.moe.layer import MoELayer, MoEModel
from rerail.stats.statistic import (
    DenseStatistic,
    RoutedStatistic,
    RoutedTokens,
    Statistic,
    StatisticSet,
)

Batch = tuple[Tensor, Tensor]
Progress = Callable[[Sequence[Batch]], Iterable[Batch]]


def pair_outputs(experts: nn.Module, hidden: Tensor, index: Tensor) -> Tensor:
    """Return each chosen expert's own output, before the gate: (T, H), (T, K) -> (T, K, H).

    Pairs are presented in the order in which the implementation itself gathers them, so that every
    matrix product has the rows that it has in the plain forward.
    """
    k = index.shape[1]
    ones = hidden.new_ones(index.numel(), 1)
    if _is_eager(experts):
        out: Tensor = experts(hidden.repeat(k, 1), index.T.reshape(-1, 1), ones)
        return out.view(k, len(hidden), -1).transpose(0, 1)
    out = experts(hidden.repeat_interleave(k, dim=0), index.reshape(-1, 1), ones)
    return out.view(len(hidden), k, -1)


def combined(experts: nn.Module, pairs: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Add gated pairs (T, K, H) up to (T, H), bit for bit as the experts module does."""
    gated = pairs * weights.unsqueeze(-1)
    if not _is_eager(experts):
        return gated.sum(dim=1).to(pairs.dtype)
    slots = experts.slots[index] if isinstance(experts, ExpertBank) else index
    order, (tokens, k) = slots.argsort(dim=1, stable=True), index.shape
    by_choice = gated.transpose(0, 1).reshape(k * tokens, -1)
    rows = order * tokens + torch.arange(tokens, device=index.device).unsqueeze(1)
    out = torch.zeros_like(pairs[:, 0])
    for i in range(k):
        out += by_choice.index_select(0, rows[:, i]).to(out.dtype)
    return out


def _is_eager(experts: nn.Module) -> bool:
    return getattr(experts.config, "_experts_implementation", None) in (None, "eager")


class _Recorder(nn.Module):
    """Stands in for `experts` during a pass."""

    def __init__(self, layer: MoELayer, statistics: Sequence[Statistic], mask: list[Tensor | None]):
        super().__init__()
        self.inner = layer.experts
        self.routed = [s for s in statistics if isinstance(s, RoutedStatistic)]
        self.dense = [s for s in statistics if isinstance(s, DenseStatistic)]
        self.held = {s: s.empty(layer) for s in statistics}
        self.mask = mask
        self.num_slots = layer.num_experts

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute as the experts do, and keep what was asked for."""
        pairs = None
        if any(s.needs_outputs for s in self.routed):
            pairs = pair_outputs(self.inner, hidden, index)
        if self.routed:
            self._update_routed(hidden, index, weights, pairs)
        if self.dense:
            self._update_dense(hidden, index, weights)
        if pairs is None:
            out: Tensor = self.inner(hidden, index, weights)
            return out
        return combined(self.inner, pairs, index, weights)

    def _valid(self, tensor: Tensor) -> Tensor:
        [mask] = self.mask
        return tensor if mask is None else tensor[mask]

    def _update_routed(
        self, hidden: Tensor, index: Tensor, weights: Tensor, pairs: Tensor | None
    ) -> None:
        norms = None if pairs is None else torch.linalg.vector_norm(pairs, dim=-1)
        tokens = RoutedTokens(
            hidden=self._valid(hidden),
            index=self._valid(index),
            gates=self._valid(weights),
            norms=None if norms is None else self._valid(norms),
            num_experts=self.num_slots,
        )
        for s in self.routed:
            self.held[s] = s.merged(self.held[s], s.of(tokens).cpu())

    def _update_dense(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        valid = self._valid(hidden)
        ones = torch.ones(len(valid), 1, dtype=weights.dtype, device=weights.device)
        for e in range(self.num_slots):
            chosen = torch.full((len(valid), 1), e, dtype=index.dtype, device=index.device)
            output = self.inner(valid, chosen, ones)
            for s in self.dense:
                self.held[s][e] = s.merged(self.held[s][e], s.of(e, valid, output).cpu())


@contextlib.contextmanager
def _recording(
    layers: Sequence[MoELayer], statistics: Sequence[Statistic], mask: list[Tensor | None]
) -> Iterator[dict[int, _Recorder]]:
    recorders = {layer.index: _Recorder(layer, statistics, mask) for layer in layers}
    for layer in layers:
        layer.swap(recorders[layer.index])
    try:
        yield recorders
    finally:
        for layer in layers:
            layer.swap(recorders[layer.index].inner)


@torch.no_grad()
def collect(
    model: MoEModel,
    batches: Sequence[Batch],
    statistics: Iterable[Statistic],
    progress: Progress = lambda batches: batches,
) -> StatisticSet:
    """Run the text through the model once and return the filled statistics.

    Args:
        model: teacher, student, or a compressed prefix.
        batches: (input_ids (B, S), mask (B, S)) pairs; masked positions count for nothing.
        statistics: what to measure; duplicates are measured once.
        progress: wraps the batches, to show a bar.

    Raises:
        InputError: a statistic came out infinite or NaN.
    """
    wanted = tuple(dict.fromkeys(statistics))
    mask: list[Tensor | None] = [None]
    with _recording(model.layers, wanted, mask) as recorders:
        device = next(model.model.parameters()).device
        for input_ids, valid in progress(batches):
            flat = valid.flatten().to(device)
            mask[0] = None if bool(flat.all()) else flat
            model.hidden(input_ids.to(device), valid.to(device))
    held = {i: {s.name: t for s, t in r.held.items()} for i, r in recorders.items()}
    for index, tensors in held.items():
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"statistic {name} of layer {index} is not finite: the model's weights or "
                    "activations hold NaN or infinity; load a sound checkpoint or a wider dtype"
                )
    return StatisticSet(held)
