"""Stock experts modules of transformers: their layout, their sizes, and shallow copies of them.

A stock module holds fused tensors with a leading expert axis, `gate_up_proj` (E, 2I, H) and
`down_proj` (E, H, I), in some families transposed, interleaved or with biases.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rerail.moe.families import is_concatenated, is_eager, is_transposed

# what accelerate puts on a module of a model with a device map: a forward of the original's own
_DISPATCHED = ("forward", "_old_forward", "_hf_hook")


class ExpertWeights(NamedTuple):
    """Experts as (out, in) matrices in every family: one expert, or a stack with a leading axis."""

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Layout:
    """How a family fuses its expert tensors."""

    transposed: bool = False
    concatenated: bool = True

    @classmethod
    def of(cls, experts: nn.Module) -> "Layout":
        """Read the layout from the flags that transformers puts on every experts module."""
        return cls(is_transposed(experts), is_concatenated(experts))

    def unpack(self, gate_up: Tensor, down: Tensor) -> ExpertWeights:
        """Split fused tensors (..., 2I, H) and (..., H, I) into gate, up (..., I, H) and down."""
        if self.transposed:
            gate_up, down = gate_up.mT, down.mT
        return ExpertWeights(*self.split(gate_up, dim=-2), down)

    def pack(self, weights: ExpertWeights) -> dict[str, Tensor]:
        """Fuse again: the inverse of `unpack`, keyed by transformers' parameter names."""
        gate_up, down = self.join(weights.gate, weights.up, dim=-2), weights.down
        if self.transposed:
            gate_up, down = gate_up.mT, down.mT
        return {"gate_up_proj": gate_up.contiguous(), "down_proj": down.contiguous()}

    def split(self, gate_up: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
        """Return the rows or outputs of gate and of up: the inverse of `join`."""
        if self.concatenated:
            gate, up = gate_up.chunk(2, dim=dim)
            return gate, up
        count = gate_up.shape[dim] // 2
        pairs: Tensor = gate_up.unflatten(dim, (count, 2))  # type: ignore[no-untyped-call]
        gate, up = pairs.unbind(dim)
        return gate, up

    def join(self, gate: Tensor, up: Tensor, dim: int = -1) -> Tensor:
        """Put the rows or outputs of gate and up into the family's order, along one axis."""
        if self.concatenated:
            return torch.cat([gate, up], dim=dim)
        return torch.stack([gate, up], dim=dim).flatten(dim - 1, dim)


class Dims(NamedTuple):
    """Sizes of the dense experts of a layer.

    Attributes:
        experts: E, the router slots.
        intermediate: I, the width of one expert.
        hidden: H.
        numbers: numbers in one expert, by the name of the fused tensor (biases included).
    """

    experts: int
    intermediate: int
    hidden: int
    numbers: Mapping[str, int]

    @property
    def expert(self) -> int:
        """Numbers in one dense expert."""
        return sum(self.numbers.values())

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each matrix of an expert."""
        wide = (self.intermediate, self.hidden)
        return {"gate": wide, "up": wide, "down": wide[::-1]}


def expert_parameters(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Return the fused parameters of a stock experts module: those with a leading expert axis."""
    count = cast(int, experts.num_experts)
    return {n: p for n, p in experts.named_parameters(recurse=False) if p.shape[0] == count}


def dims_of(experts: nn.Module) -> Dims:
    """Return the sizes of a stock experts module."""
    fused = expert_parameters(experts)
    out, inner = fused["down_proj"].shape[1:]
    if is_transposed(experts):
        out, inner = inner, out
    numbers = {name: p.shape[1:].numel() for name, p in fused.items()}
    return Dims(len(fused["down_proj"]), inner, out, numbers)


def shell_of(experts: nn.Module, parameters: Mapping[str, Tensor], count: int) -> nn.Module:
    """Return a shallow copy of a stock experts module that reads other tensors.

    Parameter objects stay the objects they are, so what is shared with a teacher stays shared; the
    copy has tables of its own, so that nothing done to it reaches the original. Where a device map
    moves the inputs of the original, the copy takes them as they come.
    """
    shell = copy.copy(experts)
    for name in _DISPATCHED:
        vars(shell).pop(name, None)
    # copy.copy shares these dicts with the original
    for table in ("_parameters", "_buffers", "_modules"):
        setattr(shell, table, dict(getattr(experts, table)))
    for name, tensor in parameters.items():
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        shell._parameters[name] = tensor
    shell.num_experts = count  # type: ignore[assignment]
    return shell


def live_sum(
    experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, live: Tensor
) -> Tensor:
    """Return sum_k weights * expert(hidden) (T, H) over the live choices; others are not computed.

    The order of summation is the same in every run, and where all are live the experts are called
    just as they would be without this.
    """
    tokens, k = index.shape
    if bool(live.all()):
        return cast(Tensor, experts(hidden, index, weights))
    flat = live.flatten().nonzero().squeeze(1)
    # a row for each choice, summed at the end: index_add would add in any order
    out = hidden.new_zeros(tokens * k, hidden.shape[1])
    if len(flat):
        slots, gates = index.flatten()[flat, None], weights.flatten()[flat, None]
        out = out.index_copy(0, flat, experts(hidden[flat // k], slots, gates).to(out.dtype))
    return out.view(tokens, k, -1).sum(dim=1)


class _Decoded(torch.autograd.Function):
    """x W^T, where W (out, in) is decoded for this product alone and again for its gradient.

    A graph over a whole model would otherwise hold every matrix that was decoded on the way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, decode: Callable[[], Tensor]) -> Tensor:
        """Return x W^T (n, out): x (n, in)."""
        ctx.decode = decode
        return F.linear(x, decode())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x; W gets none."""
        return grads[0] @ ctx.decode(), None


def decoded_product(x: Tensor, decode: Callable[[], Tensor]) -> Tensor:
    """Return x W^T (n, out) of inputs x (n, in), where `decode` makes W (out, in)."""
    return cast(Tensor, _Decoded.apply(x, decode))  # type: ignore[no-untyped-call]


def routed_sum(
    experts: nn.Module,
    index: Tensor,
    weights: Tensor,
    answer: Callable[[int, Tensor], Tensor],
    prepare: Callable[[Sequence[int]], None],
) -> Tensor:
    """Return sum_k weights * answer (T, S), one call of `answer` for each expert that is chosen.

    The order of summation is that of the family's own implementation: to the bit that of its eager
    loop, or each token's choices in turn.

    Args:
        experts: the family's module.
        index: (T, K) stored experts, at least one token.
        weights: (T, K) gate weights.
        answer: (expert, tokens (n,) that chose it) -> (n, S), a new tensor.
        prepare: is told of the next few experts before they answer, and of none at the end.
    """
    count, k = index.shape
    eager = is_eager(experts)
    # eager goes choice by choice through the tokens of an expert, grouped kernels token by token
    flat, gates = (t.T.reshape(-1) if eager else t.reshape(-1) for t in (index, weights))
    order = flat.argsort(stable=True)
    numbers = torch.bincount(flat).tolist()
    runs = [(e, pairs) for e, pairs in enumerate(torch.split(order, numbers)) if len(pairs)]

    def gated() -> Iterator[tuple[Tensor, Tensor]]:
        at_once = min(4, max(1, cast(int, experts.num_experts) // 8))
        for i, (expert, pairs) in enumerate(runs):
            if i % at_once == 0:
                prepare([e for e, _ in runs[i : i + at_once]])
            tokens = pairs % count if eager else pairs // k
            yield tokens, answer(expert, tokens).mul_(gates[pairs, None])
        prepare([])

    if eager:
        return _added_in_turn(gated(), count)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    # a row for each choice, summed at the end: index_add would add in any order on a GPU
    return torch.cat([part for _, part in gated()])[place].view(count, k, -1).sum(dim=1)


def _added_in_turn(parts: Iterator[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Return the sum of parts as eager experts add it up: expert by expert, in their dtype."""
    tokens, part = next(parts)
    total = part.new_zeros(count, part.shape[1]).index_add_(0, tokens, part)
    for tokens, part in parts:
        total.index_add_(0, tokens, part)
    return total
