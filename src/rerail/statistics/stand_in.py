"""What stands in the place of an experts module during a pass."""

from typing import Any

from torch import nn


class StandIn(nn.Module):
    """A module around another one, whose attributes it shows as its own."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)
