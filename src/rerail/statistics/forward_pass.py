"""The forward pass: one forward of the text fills every routed and dense statistic.

It must leave the model's outputs as they are, to the bit. Grouped experts are watched in their own
forward. Others are asked for each (token, choice) pair on its own with weight one, which costs the
same matrix products, and the gated pairs are added up in the order in which the module itself would
have.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.moe.model import MoELayer, MoEModel
from rerail.statistics.pairs import Answer, answer
from rerail.statistics.stand_in import StandIn
from rerail.statistics.statistic import DenseStatistic, Filled, RoutedStatistic, RoutedTokens
from rerail.statistics.surroundings import Surroundings


class _Enough(Exception):
    """The last layer that is recorded has been recorded."""


@dataclass
class _Text:
    """Where the pass is: the mask of the batch (None where all is valid) and its positions."""

    mask: Tensor | None = None
    position: Tensor | None = None
    passed: int = 0
    block: int = 0

    def turn_to(self, valid: Tensor) -> None:
        """Go on to the next batch, with this mask (B, S)."""
        flat = valid.flatten()
        self.mask = None if bool(flat.all()) else flat
        self.position = self.passed + torch.arange(len(flat), device=flat.device)
        self.passed += len(flat)
        self.block = valid.shape[1]

    def valid(self, tensor: Tensor) -> Tensor:
        """Return the valid rows of a tensor with one row a token."""
        return tensor if self.mask is None else tensor[self.mask.to(tensor.device)]


class _Recorder(StandIn):
    """Stands in for `experts` during the forward pass."""

    def __init__(self, model: MoEModel, layer: MoELayer, filled: Filled, text: _Text, last: bool):
        super().__init__(layer.experts)
        self.routed = [s for s in filled if isinstance(s, RoutedStatistic)]
        self.dense = [s for s in filled if isinstance(s, DenseStatistic)]
        self.needs = frozenset().union(*(s.needed() for s in self.routed))
        self.surroundings = Surroundings(model, layer, self.needs)
        self.filled, self.text, self.last = filled, text, last
        self.num_slots = layer.num_experts

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute as the experts do, and keep what is needed."""
        found = None
        if self.needs & {"norms", "middle", "outputs"}:
            found = answer(self.inner, hidden, index, weights, self.needs)
        if self.routed:
            tensors = {"hidden": hidden, "index": index, "gates": weights}
            tensors |= self._needed(found)
            self._update_routed(tensors)
        if self.dense:
            self._update_dense(hidden, index, weights)
        if self.last:
            raise _Enough
        if found is not None:
            return found.routed
        out: Tensor = self.inner(hidden, index, weights)
        return out

    def _needed(self, found: Answer | None) -> dict[str, Tensor]:
        tensors = {} if found is None else {n: t for n, t in vars(found).items() if t is not None}
        if "logits" in self.needs:
            tensors["logits"] = self.surroundings.logits()
        if "scores" in self.needs:
            tensors["scores"] = self.surroundings.scores()
        if "residual" in self.needs:
            tensors["residual"] = self.surroundings.residual()
        return tensors

    def _update_routed(self, tensors: dict[str, Tensor]) -> None:
        assert self.text.position is not None
        tensors["position"] = self.text.position
        valid = {name: self.text.valid(tensor) for name, tensor in tensors.items()}
        tokens = RoutedTokens(num_experts=self.num_slots, block=self.text.block, **valid)
        for s in self.routed:
            self.filled[s] = s.update(self.filled[s], tokens)

    def _update_dense(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        valid = self.text.valid(hidden)
        ones = torch.ones(len(valid), 1, dtype=weights.dtype, device=weights.device)
        for e in range(self.num_slots):
            chosen = torch.full((len(valid), 1), e, dtype=index.dtype, device=index.device)
            output = self.inner(valid, chosen, ones)
            for s in self.dense:
                state = self.filled[s][e]
                self.filled[s][e] = s.merge(state, s.measure(e, valid, output).to(state.device))


@contextlib.contextmanager
def _recording(
    model: MoEModel, layers: Sequence[MoELayer], filled: dict[int, Filled], text: _Text
) -> Iterator[None]:
    stop = layers[-1].index if layers[-1].index != model.layers[-1].index else None
    recorders = []
    try:
        for layer in layers:
            last = layer.index == stop
            recorders.append((layer, _Recorder(model, layer, filled[layer.index], text, last)))
            layer.swap(recorders[-1][1])
        yield
    finally:
        for layer, recorder in recorders:
            recorder.surroundings.remove()
            layer.swap(recorder.inner)


def forward_pass(
    model: MoEModel,
    layers: Sequence[MoELayer],
    batches: Iterable[tuple[Tensor, Tensor]],
    filled: dict[int, Filled],
    first: int,
) -> None:
    """Fill the routed and dense statistics in `filled`; `first` is the first token's position."""
    text = _Text(passed=first)
    device = next(model.model.parameters()).device
    with _recording(model, layers, filled, text):
        for input_ids, valid in batches:
            text.turn_to(valid.to(device))
            with contextlib.suppress(_Enough):
                model.hidden(input_ids.to(device), valid.to(device))
