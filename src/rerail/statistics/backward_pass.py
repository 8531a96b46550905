"""The backward pass: gradients of the true next-token loss in experts and in what they make.

Autograd on the fused tensors would make a gradient of all E experts for each expert that runs. So
each product with a stored expert is given a leaf of its own, whose gradient is taken as soon as it
is there and let go. Where only gradients of products are asked for, no weight gets one. Nothing
else of the model gets a gradient.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rerail.experts.base import bank_of
from rerail.moe.fused_experts import Layout
from rerail.moe.model import MoELayer, MoEModel
from rerail.moe.stand_in import StandIn
from rerail.statistics.loss import summed_loss
from rerail.statistics.pairs import Products, unseen, weight_of
from rerail.statistics.statistic import BackwardStatistic, Filled, OutputGradientStatistic

WEIGHTS = ("gate_up_proj", "down_proj")


class _Leaves(Products):
    """Gives every product with a stored expert a leaf of its own."""

    def __init__(self, experts: nn.Module, filled: Filled):
        super().__init__({name: weight_of(experts, name) for name in WEIGHTS})
        self.filled = {s: t for s, t in filled.items() if isinstance(s, BackwardStatistic)}
        self.made_of = {s: t for s, t in filled.items() if isinstance(s, OutputGradientStatistic)}
        self.layout = Layout.of(bank_of(experts).shell)
        stored = range(len(self.watched[WEIGHTS[0]]))
        # slots that share a stored expert share its gradient
        slots = bank_of(experts).slots.tolist()
        self.slots = {p: [e for e, s in enumerate(slots) if s == p] for p in stored}

    def product(self, func: Any, args: Any, named: dict[str, Any], name: str) -> Any:
        self.seen.append((args[0], name))
        leaf = self._leaf(args[1], name) if self.filled else args[1].detach()
        out = func(args[0], leaf, *args[2:], **named)
        if not self.made_of:
            return out
        # a sum is no leaf, so that what follows may work in place, and its gradient costs nothing
        out = out + out.new_zeros((), requires_grad=True)
        out.register_hook(lambda gradient: self._take_output(gradient, name))
        return out

    def _take_output(self, gradient: Tensor, name: str) -> None:
        parts = {"down": gradient}
        if name == WEIGHTS[0]:
            parts = dict(zip(("gate", "up"), self.layout.split(gradient), strict=True))
        for matrix, part in parts.items():
            for statistic, state in self.made_of.items():
                statistic.update(state, matrix, part)

    def _leaf(self, stored: Tensor, name: str) -> Tensor:
        """Return a leaf with a product's factor, whose gradient is handed on once it is there."""
        # eager experts multiply by one expert's slice, grouped ones by the whole stack: the offset
        # in memory says at which stored expert the factor begins
        weight, whole = stored.detach(), self.watched[name]
        first = (stored.data_ptr() - whole.data_ptr()) // (whole[0].numel() * whole.element_size())
        leaf = weight.requires_grad_()
        # some products take the stored matrix, others a transposed view of it
        turned = weight.stride()[-2:] != whole.stride()[-2:]

        def take(done: Tensor) -> None:
            assert done.grad is not None
            # taken off the leaf at once: only one product's gradient is in memory at a time
            gradient, done.grad = done.grad.mT if turned else done.grad, None
            self._take(gradient.reshape(-1, *whole.shape[1:]), first, name)

        leaf.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
        return leaf

    def _take(self, gradients: Tensor, first: int, name: str) -> None:
        for p, gradient in enumerate(gradients, start=first):
            for e in self.slots[p]:
                for statistic, state in self.filled.items():
                    statistic.update(state, e, name, gradient)


class _Watched(StandIn):
    """Stands in for `experts` during the backward pass."""

    def __init__(self, experts: nn.Module, filled: Filled):
        super().__init__(experts)
        self.filled = filled

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute as the experts do.

        Raises:
            OutOfReach: the products do not read the stored weights.
        """
        with _Leaves(self.inner, self.filled) as leaves:
            out: Tensor = self.inner(hidden, index, weights)
        if {name for _, name in leaves.seen} != set(WEIGHTS):
            raise unseen(self.inner, "gradients")
        return out


@contextlib.contextmanager
def _watching(
    model: MoEModel, layers: Sequence[MoELayer], filled: dict[int, Filled]
) -> Iterator[None]:
    trained = [p for p in model.model.parameters() if p.requires_grad]
    with contextlib.ExitStack() as stack:
        for parameter in trained:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        for layer in layers:
            watched = _Watched(layer.experts, filled[layer.index])
            stack.enter_context(layer.swapped(watched))
        yield


def backward_pass(
    model: MoEModel,
    layers: Sequence[MoELayer],
    batches: Iterable[tuple[Tensor, Tensor]],
    filled: dict[int, Filled],
) -> None:
    """Fill the backward statistics in `filled`, sequence by sequence."""
    device = next(model.model.parameters()).device
    with _watching(model, layers, filled), torch.enable_grad():
        for input_ids, mask in batches:
            # one by one: a square of a sequence's gradient is not in that of a batch
            for ids, valid in zip(input_ids.to(device), mask.to(device), strict=True):
                loss, targets = summed_loss(model, ids[None], valid[None])
                if targets:
                    torch.autograd.backward(loss / targets)
