"""The forward pass: one forward of the text fills every routed and dense statistic.

It must leave the model's outputs as they are, to the bit. Grouped experts are watched in their own
forward. Others are asked for each (token, choice) pair on its own with weight one, which costs the
same matrix products, and the gated pairs are added up in the order in which the module itself would
have.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rerail.moe.families import decoder_layer
from rerail.moe.model import MoELayer, MoEModel
from rerail.moe.stand_in import StandIn
from rerail.statistics.pairs import answer
from rerail.statistics.statistic import DenseStatistic, Filled, RoutedStatistic, RoutedTokens
from rerail.statistics.surroundings import Surroundings, first_tensor


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
        # without padding no copy of the valid rows is made
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
        self.streamed = [s for s in self.routed if "stream" in s.needed()]
        self.tokens: RoutedTokens | None = None
        if self.streamed:
            decoder = decoder_layer(model.model, layer.name)
            self.surroundings.hooks.append(
                decoder.register_forward_hook(self._left, with_kwargs=True)
            )

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute as the experts do, and keep what is needed."""
        answers = {}
        if self.needs & {"norms", "middle", "outputs"}:
            answers = answer(self.inner, hidden, index, weights, self.needs)
        if self.routed:
            self._update_routed({"hidden": hidden, "index": index, "gates": weights, **answers})
        if self.dense:
            self._update_dense(hidden, index, weights)
        # nothing behind the last layer is asked for, so the rest of the forward is saved
        if self.last and not self.streamed:
            raise _Enough
        return answers["routed"] if answers else cast(Tensor, self.inner(hidden, index, weights))

    def _update_routed(self, tensors: dict[str, Tensor]) -> None:
        tensors |= self.surroundings.take()
        assert self.text.position is not None
        tensors["position"] = self.text.position
        valid: Any = {name: self.text.valid(tensor) for name, tensor in tensors.items()}
        tokens = RoutedTokens(num_experts=self.num_slots, block=self.text.block, **valid)
        for s in self.routed:
            if s not in self.streamed:
                self.filled[s] = s.update(self.filled[s], tokens)
        self.tokens = tokens if self.streamed else None

    def _left(self, _decoder: nn.Module, args: Any, named: Any, output: Any) -> None:
        """Update what compares the stream into the decoder layer with that out of it."""
        leaving = first_tensor(output if isinstance(output, tuple) else (output,), {})
        ends = (cast(Tensor, end) for end in (first_tensor(args, named), leaving))
        into, out = (self.text.valid(end.reshape(-1, end.shape[-1])) for end in ends)
        tokens = replace(cast(RoutedTokens, self.tokens), stream=(into, out))
        self.tokens = None  # tensors of this forward must not live until the next one
        for s in self.streamed:
            self.filled[s] = s.update(self.filled[s], tokens)
        if self.last:
            raise _Enough

    def _update_dense(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        valid = self.text.valid(hidden)
        ones = torch.ones(len(valid), 1, dtype=weights.dtype, device=weights.device)
        for e in range(self.num_slots):
            chosen = torch.full((len(valid), 1), e, dtype=index.dtype, device=index.device)
            # a gate weight of one makes the answer the expert's own output
            output = self.inner(valid, chosen, ones)
            for s in self.dense:
                state = self.filled[s][e]
                self.filled[s][e] = s.merge(state, s.measure(e, valid, output).to(state.device))


@contextlib.contextmanager
def _recording(
    model: MoEModel, layers: Sequence[MoELayer], filled: dict[int, Filled], text: _Text
) -> Iterator[None]:
    # after the last MoE layer of the model the forward may as well run to its end
    stop = layers[-1].index if layers[-1].index != model.layers[-1].index else None
    with contextlib.ExitStack() as stack:
        for layer in layers:
            last = layer.index == stop
            recorder = _Recorder(model, layer, filled[layer.index], text, last)
            stack.callback(recorder.surroundings.remove)
            stack.enter_context(layer.swapped(recorder))
        yield


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
