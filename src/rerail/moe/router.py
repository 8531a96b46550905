"""Routers: which rows they have, how to keep some of them, and how to silence some."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")


def slice_rows(module: nn.Module, kept: Sequence[int], experts: int, *, recurse: bool) -> None:
    """Keep the given rows of every tensor of `module` that has one entry an expert, in place.

    Covers router rows (E, H), biases and correction buffers (E,) or (1, E), and count attributes.
    New tensors are made, so whatever was shared with a teacher is left as it was.
    """
    index = torch.tensor(kept, dtype=torch.int64)
    for part in module.modules() if recurse else [module]:
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                axis = _expert_axis(tensor, experts)
                if tensor is not None and axis is not None:
                    new = tensor.detach().index_select(axis, index.to(tensor.device))
                    parameter = isinstance(tensor, nn.Parameter)
                    table[name] = nn.Parameter(new, tensor.requires_grad) if parameter else new  # type: ignore[assignment]
        for name in _COUNTS:
            if getattr(part, name, None) == experts:
                setattr(part, name, len(kept))


def _expert_axis(tensor: Tensor | None, experts: int) -> int | None:
    if tensor is None:
        return None
    if tensor.dim() in (1, 2) and tensor.shape[0] == experts:
        return 0
    return 1 if tensor.dim() == 2 and tuple(tensor.shape) == (1, experts) else None


class MaskedRouter(nn.Module):
    """A router that keeps all rows but never selects the dropped ones: their logit is -inf.

    The family's own router computes; the -inf is added to the one product that has E columns, and
    to a correction bias where there is one (a sigmoid of -inf is 0, which a bias could still lift).
    """

    def __init__(self, router: nn.Module, kept: Sequence[int], experts: int):
        super().__init__()
        self.inner = copy.copy(router)
        self.inner._buffers = dict(router._buffers)
        dropped = torch.ones(experts, dtype=torch.bool)
        dropped[list(kept)] = False
        self.register_buffer("dropped", dropped)
        bias = self.inner._buffers.get("e_score_correction_bias")
        if bias is not None:
            self.inner._buffers["e_score_correction_bias"] = bias.masked_fill(dropped, -torch.inf)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Route as the inner router does, over the kept rows only."""
        with _MinusInfinity(self.get_buffer("dropped")):
            return self.inner(*args, **kwargs)


class _MinusInfinity(TorchFunctionMode):
    def __init__(self, dropped: Tensor):
        super().__init__()
        self.dropped = dropped

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and out.shape[-1] == len(self.dropped):
            return out.masked_fill(self.dropped, -torch.inf)
        return out
