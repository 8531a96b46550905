"""Router and experts of one block as functions of sampled rows."""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rerail.errors import InputError
from rerail.experts.base import ExpertBank
from rerail.moe.families import traits_of
from rerail.moe.fused_experts import shell_of
from rerail.moe.router import MaskedRouter


class _Reached(Exception):
    """The block has called its experts."""


class _Catcher(nn.Module):
    """Stands in for `experts`, and ends the block's forward with what it was handed."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.inner = experts
        self.routed: tuple[Tensor, Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.routed = index, weights
        raise _Reached


class Answering:
    """What a MoELayer can be asked on rows (T, H) outside a forward of its model."""

    block: nn.Module

    @property
    @abstractmethod
    def experts(self) -> nn.Module:
        """The experts module."""

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """E."""

    @property
    @abstractmethod
    def top_k(self) -> int:
        """K."""

    @contextlib.contextmanager
    def only(self, slots: Sequence[int]) -> Iterator[None]:
        """Let the router select these slots only, for a while.

        Raises:
            InputError: fewer slots than a token chooses.
        """
        traits = traits_of(self.block)
        assert traits is not None
        router = cast(nn.Module, getattr(self.block, traits.router))
        inner, kept = router, sorted(set(slots))
        if isinstance(router, MaskedRouter):
            dropped = router.get_buffer("dropped").tolist()
            inner, kept = router.inner, [e for e in kept if not dropped[e]]
        if len(kept) < self.top_k:
            raise InputError(
                f"{len(kept)} selectable experts are too few for a router that chooses "
                f"{self.top_k}: at least {self.top_k} are needed"
            )
        setattr(self.block, traits.router, MaskedRouter(inner, kept, self.num_experts))
        try:
            yield
        finally:
            setattr(self.block, traits.router, router)

    @torch.no_grad()
    def route(self, hidden: Tensor, slots: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return chosen slots and gate weights (T, K), as the block itself would hand them over.

        Args:
            hidden: (T, H) inputs of the block.
            slots: the only slots that may be selected; None for all.
        """
        if slots is not None:
            with self.only(slots):
                return self.route(hidden)
        experts = self.experts
        catcher = _Catcher(experts)
        self.block.experts = catcher
        try:
            with contextlib.suppress(_Reached):
                self.block(hidden.unsqueeze(0))
        finally:
            self.block.experts = experts
        assert catcher.routed is not None
        return catcher.routed

    @torch.no_grad()
    def run(self, hidden: Tensor, index: Tensor, weights: Tensor, **swapped: Tensor) -> Tensor:
        """Return what the routed experts answer (T, H).

        Args:
            hidden: (T, H) inputs of the experts.
            index: (T, K) slots.
            weights: (T, K) gate weights.
            swapped: fused tensors by stock name that stand in for the experts' own.
        """
        experts = self.experts
        if swapped:
            stock = experts.as_stock() if isinstance(experts, ExpertBank) else experts
            experts = shell_of(stock, swapped, len(next(iter(swapped.values()))))
        return cast(Tensor, experts(hidden, index, weights))

    def answer(self, hidden: Tensor, slots: Sequence[int] | None = None) -> Tensor:
        """Return the routed output (T, H) when only these slots may be selected (None: all).

        Raises:
            InputError: fewer slots than a token chooses.
        """
        index, weights = self.route(hidden, slots)
        return self.run(hidden, index, weights)
