"""Routers: which rows they have, how to keep some of them, and how to silence some."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rerail.moe.families import is_correction_bias, rows_of_others, set_row_count
from rerail.moe.stand_in import StandIn, copy_of_modules

_Table = dict[str, Any]


def rows_of(
    module: nn.Module, experts: int, *, recurse: bool
) -> Iterator[tuple[_Table, str, Tensor, int]]:
    """Yield table, name, tensor and expert axis of every tensor with one entry an expert.

    Covers router rows (E, H), and biases and correction biases (E,) or (1, E). Rows may be followed
    by those of shared experts.
    """
    others = rows_of_others(module)
    for part in module.modules() if recurse else [module]:
        tables = cast(list[_Table], [part._parameters, part._buffers])
        for table in tables:
            # a copy of the table: callers replace its entries while they iterate
            for name, tensor in list(table.items()):
                axis = None if tensor is None else _expert_axis(tensor.shape, experts, others)
                if axis is not None:
                    yield table, name, tensor, axis


def _expert_axis(shape: Sequence[int], experts: int, others: int) -> int | None:
    if len(shape) in (1, 2) and shape[0] in (experts, experts + others):
        return 0
    return 1 if tuple(shape) == (1, experts) else None


def slice_rows(module: nn.Module, kept: Sequence[int], experts: int, *, recurse: bool) -> None:
    """Keep the given rows of every tensor of `module` that has one entry an expert, in place.

    Counts of experts follow. New tensors are made, so what a teacher shares is left as it was.
    """
    for table, name, tensor, axis in rows_of(module, experts, recurse=recurse):
        others = range(experts, tensor.shape[axis])
        index = torch.tensor([*kept, *others], dtype=torch.int64, device=tensor.device)
        new = tensor.detach().index_select(axis, index)
        trained = isinstance(tensor, nn.Parameter)
        table[name] = nn.Parameter(new, tensor.requires_grad) if trained else new
    for part in module.modules() if recurse else [module]:
        set_row_count(part, experts, len(kept))


def gates_are_constant(router: nn.Module, hidden_size: int) -> bool:
    """Return whether a random copy of the router gives every token the same gate weight."""
    # to_empty: the router may lie on the meta device, where there is nothing to copy
    random = copy.deepcopy(router).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*random.parameters(), *random.buffers()]:
            # a factor for each expert is no gradient of its row
            ones = torch.ones(tensor.shape)
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn if tensor.dim() > 1 else ones)
        _, weights, _ = random(torch.randn(8, hidden_size, generator=generator))
    return bool(torch.allclose(weights, weights.flatten()[0].expand_as(weights)))


class MaskedRouter(StandIn):
    """A router that keeps all rows but never selects the dropped ones: their logit is -inf.

    The family's own router computes; -inf is put into the one product that has E columns, and into
    a correction bias where there is one, of the router or handed to it (a sigmoid of -inf is 0,
    which a bias could still lift). Dropped experts leave the softmax too, so gate weights are those
    of the sliced router: where a family does not renormalise over the chosen experts (OLMoE,
    DeepSeek-V2), those of the kept experts grow by the probability that the dropped ones had.

    `inner` is a copy with modules of its own and the same Parameters, except correction biases.
    Rows of shared experts behind the others are never dropped.
    """

    def __init__(self, router: nn.Module, kept: Sequence[int], experts: int):
        super().__init__(copy_of_modules(router))
        dropped = torch.ones(experts, dtype=torch.bool, device=next(router.parameters()).device)
        dropped[list(kept)] = False
        self.register_buffer("dropped", dropped, persistent=False)
        for table, name, tensor, _ in rows_of(self.inner, experts, recurse=True):
            if is_correction_bias(name):
                new = tensor.detach().masked_fill(dropped, -torch.inf)
                trained = isinstance(tensor, nn.Parameter)
                table[name] = nn.Parameter(new, requires_grad=False) if trained else new

    def forward(self, hidden: Tensor, *others: Any, **named: Any) -> Any:
        dropped = self.get_buffer("dropped")
        with _MinusInfinity(F.pad(dropped, (0, rows_of_others(self.inner)))):
            silent = [_silenced(value, dropped) for value in others]
            return self.inner(
                hidden, *silent, **{k: _silenced(v, dropped) for k, v in named.items()}
            )


def _silenced(value: Any, dropped: Tensor) -> Any:
    is_bias = isinstance(value, Tensor) and value.is_floating_point()
    if is_bias and value.shape[-1:] == dropped.shape:
        return value.masked_fill(dropped, -torch.inf)
    return value


class _MinusInfinity(TorchFunctionMode):
    def __init__(self, dropped: Tensor):
        super().__init__()
        self.dropped = dropped

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # before the softmax or sigmoid, which only the inner forward knows
        if func is F.linear and out.shape[-1] == len(self.dropped):
            return out.masked_fill(self.dropped, -torch.inf)
        return out
