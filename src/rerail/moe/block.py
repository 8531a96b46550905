"""One MoE block: its router, its experts, and both of them as functions of rows."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from rerail.errors import InputError
from rerail.experts.base import ExpertBank, bank_of
from rerail.moe.families import (
    experts_of,
    groups_of,
    router_input,
    rows_of_others,
    set_experts,
    top_groups_of,
    top_k_of,
    traits_of,
)
from rerail.moe.fused_experts import shell_of
from rerail.moe.router import MaskedRouter, gates_are_constant, rows_of, slice_rows
from rerail.moe.stand_in import StandIn


class RoutedBlock:
    """What can be read off one MoE block, changed in it, and asked of it on rows (T, H).

    Attributes:
        index: position of the decoder layer in the model.
        block: the module that owns router and experts.
    """

    index: int
    block: nn.Module

    # ---- experts

    @property
    def experts(self) -> nn.Module:
        return experts_of(self.block)

    @property
    def bank(self) -> ExpertBank:
        """The experts as a bank: the one in place, or a view of the family's own."""
        return bank_of(self.experts, self.index)

    def swap(self, experts: nn.Module) -> None:
        """Put a bank in the place of the experts."""
        set_experts(self.block, experts)

    @contextlib.contextmanager
    def swapped(self, experts: nn.Module) -> Iterator[None]:
        """Put a module in the place of the experts for a while."""
        before = self.experts
        self.swap(experts)
        try:
            yield
        finally:
            self.swap(before)

    # ---- router

    @property
    def router(self) -> nn.Module:
        return cast(nn.Module, getattr(self.block, self.router_name))

    @property
    def router_name(self) -> str:
        """The block's attribute for its router."""
        return traits_of(self.block).router

    def set_router(self, router: nn.Module) -> None:
        setattr(self.block, self.router_name, router)

    @property
    def inner_router(self) -> nn.Module:
        """The family's own router, also below a mask."""
        return self.router.inner if isinstance(self.router, MaskedRouter) else self.router

    @property
    def selectable_rows(self) -> tuple[int, ...]:
        """The router rows that can be chosen: all, but for those that a mask silences."""
        if not isinstance(self.router, MaskedRouter):
            return tuple(range(self.num_experts))
        return tuple(torch.nonzero(~self.router.get_buffer("dropped")).flatten().tolist())

    @property
    def router_rows(self) -> Tensor:
        """The router's weight (E, H), without rows of shared experts that may lie behind."""
        owner, name = self.rows_owner()
        rows = cast(nn.Parameter, getattr(owner, name))
        return rows[: self.num_experts] if rows_of_others(self.inner_router) else rows

    def rows_owner(self) -> tuple[nn.Module, str]:
        """Return the module and the parameter name that hold the router's rows."""
        *path, name = traits_of(self.block).rows.split(".")
        return self.inner_router.get_submodule(".".join(path)), name

    @property
    def num_experts(self) -> int:
        """E, the number of router rows, one for each routed expert."""
        owner, name = self.rows_owner()
        return len(getattr(owner, name)) - rows_of_others(self.inner_router)

    @property
    def top_k(self) -> int:
        """K, the experts chosen for a token."""
        return top_k_of(self.block, self.inner_router)

    @property
    def num_groups(self) -> int:
        """Groups of a group-limited router; 1 where routing is not grouped."""
        return groups_of(self.inner_router)

    @property
    def top_k_groups(self) -> int:
        """Groups chosen for a token; 1 where routing is not grouped."""
        return top_groups_of(self.inner_router)

    @property
    def least_per_group(self) -> int:
        """Selectable experts that a group needs: K in the chosen groups, and 2 to score a group."""
        if self.num_groups == 1:
            return self.top_k
        return max(2, -(-self.top_k // self.top_k_groups))

    @property
    def row_size(self) -> int:
        """Numbers that a checkpoint holds for one router row: the row and its biases."""
        # a correction bias may lie on the block itself; its submodules are experts
        owners = [(self.inner_router, True), (self.block, False)]
        rows = [r for m, deep in owners for r in rows_of(m, self.num_experts, recurse=deep)]
        return sum(tensor.numel() // tensor.shape[axis] for _, _, tensor, axis in rows)

    def keep_rows(self, kept: tuple[int, ...]) -> None:
        """Keep only these router rows (and correction biases), in place."""
        experts = self.num_experts
        slice_rows(self.router, kept, experts, recurse=True)
        slice_rows(self.block, kept, experts, recurse=False)

    def mask_rows(self, kept: tuple[int, ...]) -> None:
        """Keep all router rows but never select the others."""
        self.set_router(MaskedRouter(self.router, kept, self.num_experts))

    def unmask(self) -> None:
        """Take a mask off by slicing the rows that it silences, where there is one.

        The choice of experts and their gate weights stay as they were.
        """
        rows, router = self.selectable_rows, self.inner_router
        if router is self.router:
            return
        self.set_router(router)
        if len(rows) < self.num_experts:
            self.keep_rows(rows)

    def gates_are_constant(self) -> bool:
        """Return whether gate weights never change (top-1, renormalised): rows get no gradient."""
        hidden_size = self.router_rows.shape[1]
        return self.top_k == 1 and gates_are_constant(self.inner_router, hidden_size)

    def router_hash(self) -> str:
        """Return 16 hex digits for all that a router holds per expert: rows, biases and masks.

        Values count, not the dtype that holds them.
        """
        total = hashlib.sha256()
        for owner, deep in ((self.router, True), (self.block, False)):
            for _, name, tensor, _ in rows_of(owner, self.num_experts, recurse=deep):
                total.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        return total.hexdigest()[:16]

    def check_router(self, fitted_on: str) -> None:
        """Check that numbers were fitted on this router; an empty hash and the meta device pass.

        Raises:
            InputError: they were fitted on another one.
        """
        if not fitted_on or self.router_rows.is_meta:
            return
        if (own := self.router_hash()) != fitted_on:
            raise InputError(
                f"layer {self.index}: its skipping policy was fitted on the router {fitted_on}, "
                f"and this one is {own}; fit it again on this router, or set "
                "compressor.allow_stale=true"
            )

    # ---- router and experts on rows, outside a forward of the model

    @contextlib.contextmanager
    def only(self, slots: Sequence[int]) -> Iterator[None]:
        """Let the router select these slots only, for a while.

        Raises:
            InputError: fewer slots than a token chooses.
        """
        router, inner = self.router, self.inner_router
        kept = sorted(set(slots) & set(self.selectable_rows))
        if len(kept) < self.top_k:
            raise InputError(
                f"{len(kept)} selectable experts are too few for a router that chooses "
                f"{self.top_k}: at least {self.top_k} are needed"
            )
        # around the inner router: masks do not nest, and `kept` obeys the mask that is there
        self.set_router(MaskedRouter(inner, kept, self.num_experts))
        try:
            yield
        finally:
            self.set_router(router)

    @torch.no_grad()
    def route(self, hidden: Tensor, slots: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return chosen slots and gate weights (T, K), as the block itself would hand them over.

        Args:
            hidden: (T, H) inputs of the experts.
            slots: the only slots that may be selected; None for all.
        """
        if slots is not None:
            with self.only(slots):
                return self.route(hidden)
        if (inputs := router_input(self.block, hidden)) is not None:
            _, weights, index = self.router(inputs)
            return index, weights
        catcher = _Catcher(self.experts)
        # the block itself routes, whatever its family does between the router and its experts
        with self.swapped(catcher), contextlib.suppress(_Reached):
            self.block(hidden.unsqueeze(0))
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
            stock = self.bank.as_stock()
            experts = shell_of(stock, swapped, len(next(iter(swapped.values()))))
        return cast(Tensor, experts(hidden, index, weights))

    def answer(self, hidden: Tensor, slots: Sequence[int] | None = None) -> Tensor:
        """Return the routed output (T, H) when only these slots may be selected (None: all).

        Raises:
            InputError: fewer slots than a token chooses.
        """
        index, weights = self.route(hidden, slots)
        return self.run(hidden, index, weights)


class _Reached(Exception):
    """The block has called its experts."""


class _Catcher(StandIn):
    """Stands in for `experts`, and ends the block's forward with what it was handed."""

    routed: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.routed = index, weights
        raise _Reached
