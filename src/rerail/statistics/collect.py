"""The passes: one forward of the text fills every routed and dense statistic that was asked for.

The routed pass must leave the model's outputs as they are, to the bit. It asks the experts module
for each (token, choice) pair on its own with weight one, which costs the same matrix products, and
adds the gated pairs up in the order in which the module itself would have. Backward and ablation
statistics have passes of their own.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rerail.errors import InputError
from rerail.moe.model import MoELayer, MoEModel
from rerail.parallel import my_share, reduce_in_rank_order
from rerail.statistics.ablation import ablation_pass
from rerail.statistics.gradients import backward_pass
from rerail.statistics.pairs import combined, pair_outputs, pairs_and_middle
from rerail.statistics.statistic import (
    DenseStatistic,
    RoutedStatistic,
    RoutedTokens,
    Statistic,
    StatisticSet,
)
from rerail.statistics.surroundings import Surroundings

Batch = tuple[Tensor, Tensor]
Progress = Callable[[Sequence[Batch]], Iterable[Batch]]
Held = dict[Statistic, Tensor]


class _Enough(Exception):
    """The last layer that is recorded has been recorded."""


@dataclass
class _Text:
    """Where the pass is: the mask of the batch (None where all is valid) and its positions."""

    mask: Tensor | None = None
    position: Tensor | None = None
    passed: int = 0

    def turn_to(self, valid: Tensor) -> None:
        """Go on to the next batch, with this mask (B, S)."""
        flat = valid.flatten()
        self.mask = None if bool(flat.all()) else flat
        self.position = self.passed + torch.arange(len(flat), device=flat.device)
        self.passed += len(flat)

    def valid(self, tensor: Tensor) -> Tensor:
        """Return the valid rows of a tensor with one row a token."""
        return tensor if self.mask is None else tensor[self.mask]


class _Recorder(nn.Module):
    """Stands in for `experts` during a pass."""

    def __init__(self, model: MoEModel, layer: MoELayer, held: Held, text: _Text, last: bool):
        super().__init__()
        self.inner = layer.experts
        self.routed = [s for s in held if isinstance(s, RoutedStatistic)]
        self.dense = [s for s in held if isinstance(s, DenseStatistic)]
        self.needs = frozenset().union(*(s.asks() for s in self.routed))
        self.surroundings = Surroundings(model, layer, self.needs)
        self.held, self.text, self.last = held, text, last
        self.num_slots = layer.num_experts

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute as the experts do, and keep what was asked for."""
        pairs = middle = out = None
        if "middle" in self.needs:
            pairs, middle = pairs_and_middle(self.inner, hidden, index)
        elif "outputs" in self.needs:
            pairs = pair_outputs(self.inner, hidden, index)
        if pairs is not None:
            out = combined(self.inner, pairs, index, weights)
        if self.routed:
            found = {"hidden": hidden, "index": index, "gates": weights}
            self._update_routed(found, pairs, middle, out)
        if self.dense:
            self._update_dense(hidden, index, weights)
        if self.last:
            raise _Enough
        if out is None:
            out = self.inner(hidden, index, weights)
        return out

    def _update_routed(
        self,
        found: dict[str, Tensor],
        pairs: Tensor | None,
        middle: Tensor | None,
        out: Tensor | None,
    ) -> None:
        if pairs is not None and out is not None and "outputs" in self.needs:
            found |= {"outputs": pairs, "routed": out}
            found["norms"] = torch.linalg.vector_norm(pairs, dim=-1, dtype=torch.float32)
        if middle is not None:
            found["middle"] = middle
        if "logits" in self.needs:
            found["logits"] = self.surroundings.logits()
        if "residual" in self.needs:
            found["residual"] = self.surroundings.residual()
        assert self.text.position is not None
        found["position"] = self.text.position
        valid = {name: self.text.valid(tensor) for name, tensor in found.items()}
        tokens = RoutedTokens(num_experts=self.num_slots, **valid)
        for s in self.routed:
            self.held[s] = s.taken(self.held[s], tokens)

    def _update_dense(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        valid = self.text.valid(hidden)
        ones = torch.ones(len(valid), 1, dtype=weights.dtype, device=weights.device)
        for e in range(self.num_slots):
            chosen = torch.full((len(valid), 1), e, dtype=index.dtype, device=index.device)
            output = self.inner(valid, chosen, ones)
            for s in self.dense:
                self.held[s][e] = s.merged(self.held[s][e], s.of(e, valid, output).cpu())


@contextlib.contextmanager
def _recording(
    model: MoEModel, layers: Sequence[MoELayer], held: dict[int, Held], text: _Text
) -> Iterator[None]:
    stop = layers[-1].index if layers[-1].index != model.layers[-1].index else None
    recorders = []
    try:
        for layer in layers:
            last = layer.index == stop
            recorders.append((layer, _Recorder(model, layer, held[layer.index], text, last)))
            layer.swap(recorders[-1][1])
        yield
    finally:
        for layer, recorder in recorders:
            recorder.surroundings.remove()
            layer.swap(recorder.inner)


def _forward_pass(
    model: MoEModel, layers: Sequence[MoELayer], batches: Iterable[Batch], held: dict[int, Held],
    first: int,
) -> None:  # fmt: skip
    text = _Text(passed=first)
    device = next(model.model.parameters()).device
    with _recording(model, layers, held, text):
        for input_ids, valid in batches:
            text.turn_to(valid.to(device))
            with contextlib.suppress(_Enough):
                model.hidden(input_ids.to(device), valid.to(device))


@torch.no_grad()
def collect(
    model: MoEModel,
    batches: Sequence[Batch],
    statistics: Iterable[Statistic],
    progress: Progress = lambda batches: batches,
    *,
    layers: Collection[int] | None = None,
    first: int = 0,
) -> StatisticSet:
    """Run the text through the model once and return the filled statistics.

    In a group of processes all must call it, and each runs its part of the batches; what comes back
    is merged, and the same for all.

    Args:
        model: teacher, student, or a compressed prefix.
        batches: (input_ids (B, S), mask (B, S)) pairs; masked positions count for nothing.
        statistics: what to measure; duplicates are measured once.
        progress: wraps the batches, to show a bar.
        layers: indices of the layers to measure; None for all. A forward ends after the last.
        first: position in the text of the first token, where the batches are a shard of it.

    Raises:
        InputError: a statistic came out infinite or NaN, or cannot be measured on this model.
    """
    begin, mine = my_share(batches)
    first += sum(ids.numel() for ids, _ in batches[:begin])
    wanted = tuple(dict.fromkeys(statistics))
    chosen = [la for la in model.layers if layers is None or la.index in layers]
    runs = {run: [s for s in wanted if s.run == run] for run in ("backward", "ablation")}
    forward = [s for s in wanted if s.run in ("routed", "dense")]
    held = {la.index: {s: s.empty(la) for s in wanted} for la in chosen}
    if forward and chosen:
        parts = {i: {s: t for s, t in h.items() if s in forward} for i, h in held.items()}
        _forward_pass(model, chosen, progress(mine), parts, first)
        held = {i: {**h, **parts[i]} for i, h in held.items()}
    if runs["backward"]:
        backward_pass(model, chosen, progress(mine), held)
    if runs["ablation"]:
        ablation_pass(model, chosen, progress(mine), held)
    for index, tensors in held.items():
        for statistic, tensor in tensors.items():
            tensors[statistic] = reduce_in_rank_order(tensor, statistic.merged)
            _check(statistic, tensors[statistic], index)
    return StatisticSet({i: {s.name: t for s, t in h.items()} for i, h in held.items()})


def _check(statistic: Statistic, tensor: Tensor, index: int) -> None:
    if not statistic.is_finite(tensor):
        raise InputError(
            f"statistic {statistic.name} of layer {index} is not finite: the model's weights or "
            "activations hold NaN or infinity; load a sound checkpoint or a wider dtype"
        )
