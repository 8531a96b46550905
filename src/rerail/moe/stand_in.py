"""Modules that stand in the place of others, and copies of modules that share their tensors."""

import copy
from typing import Any, TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


class StandIn(nn.Module):
    """A module around another one, whose attributes it shows as its own."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # `inner` itself is asked of nn.Module, so that a copy in the making does not recurse
            return getattr(super().__getattr__("inner"), name)


def copy_of_modules(module: _Module) -> _Module:
    """Return a copy with new modules and the very same Parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
