"""Experts one (token, choice) pair at a time: their outputs and middle activations, bit for bit."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rerail.errors import OutOfReach
from rerail.experts.base import ExpertBank, bank_of
from rerail.moe.families import experts_implementation, has_norm_after, is_eager


def answer(
    experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, needs: Collection[str]
) -> dict[str, Tensor]:
    """Return the experts' own answer, `routed` (T, H), and the parts of it that are needed.

    Stock experts under `grouped_mm` compute all pairs in one product, which can be watched in their
    own forward; others are asked for each pair on its own, and the answer is added up again.

    Args:
        experts: of a block.
        hidden: (T, H) their inputs.
        index: (T, K) chosen slots.
        weights: (T, K) gate weights.
        needs: of `norms`, `outputs` and `middle`, which `RoutedTokens` describes.
    """
    if _grouped(experts):
        with Products({"down_proj": weight_of(experts, "down_proj")}) as products:
            out: Tensor = experts(hidden, index, weights)
        # one product over all pairs, or the kernel does not run as this function knows it
        if [len(made) for made in products.made] == [index.numel()]:
            [(middle, _)], [pairs] = products.seen, products.made
            order = torch.sort(index.reshape(-1)).indices  # as the experts sort, ties included
            parts = _needed(needs, pairs, middle)
            in_order = {name: _unsorted(part, order) for name, part in parts.items()}
            by_token = {n: p.view(*index.shape, *p.shape[1:]) for n, p in in_order.items()}
            return {"routed": out, **by_token}
    if "middle" in needs:
        pairs, middle = pairs_and_middle(experts, hidden, index)
        parts = _needed(needs, pairs, middle)
    else:
        pairs = pair_outputs(experts, hidden, index)
        parts = _needed(needs, pairs, None)
    return {"routed": combined(experts, pairs, index, weights), **parts}


def _needed(needs: Collection[str], pairs: Tensor, middle: Tensor | None) -> dict[str, Tensor]:
    """Return the needed ones of norms, outputs and middle activations, pair by pair."""
    parts = {"outputs": pairs, "middle": middle}
    if "norms" in needs:  # before pairs are put in order: of these a norm is one number
        parts["norms"] = torch.linalg.vector_norm(pairs, dim=-1, dtype=torch.float32)
    return {name: part for name, part in parts.items() if name in needs and part is not None}


def _grouped(experts: nn.Module) -> bool:
    plain = bank_of(experts).is_stock and not has_norm_after(experts)
    return plain and experts_implementation(experts.config) == "grouped_mm"


def _unsorted(rows: Tensor, order: Tensor) -> Tensor:
    """Return rows in the order that they had before they were sorted by `order`."""
    out = torch.empty_like(rows)
    out[order] = rows
    return out


def pair_outputs(experts: nn.Module, hidden: Tensor, index: Tensor) -> Tensor:
    """Return each chosen expert's own output, before the gate: (T, H), (T, K) -> (T, K, H).

    Pairs are presented in the order in which the implementation itself gathers them, so that every
    matrix product has the rows that it has in the plain forward.
    """
    k = index.shape[1]
    repeated = hidden.repeat(k, 1) if is_eager(experts) else hidden.repeat_interleave(k, dim=0)
    presented = _presented(experts, index).unsqueeze(1)
    out: Tensor = experts(repeated, presented, hidden.new_ones(index.numel(), 1))
    return _by_token(out, index, experts)


def _presented(experts: nn.Module, index: Tensor) -> Tensor:
    """Return the slots (T, K) of pairs as (T * K,), in the order in which pairs are presented."""
    # eager goes choice by choice through the tokens of an expert, grouped kernels token by token
    return (index.T if is_eager(experts) else index).reshape(-1)


def pairs_and_middle(experts: nn.Module, hidden: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return pair outputs (T, K, H) and what went into the down projections (T, K, I).

    No implementation of whole experts hands its middle activations out, but each is the left factor
    of a product with the stored down projections, in runs sorted by stored expert.

    Raises:
        OutOfReach: the products do not read the stored weights (another experts implementation).
    """
    inner = bank_of(experts).nested()[0]
    if inner.computes:
        pairs, runs = _handed_out(inner, experts, hidden, index)
    else:
        with Products({"down_proj": weight_of(experts, "down_proj")}) as products:
            pairs = pair_outputs(experts, hidden, index)
        runs = [left for left, _ in products.seen]
    if sum(len(run) for run in runs) != index.numel():
        raise unseen(experts, "middle activations")
    stored = bank_of(experts).slots[_presented(experts, index)]
    # grouped_mm sorts by this very call, and ties fall as they fall there
    stable = is_eager(experts) or inner.computes
    order = stored.argsort(stable=True) if stable else torch.sort(stored).indices
    return pairs, _by_token(_unsorted(torch.cat(runs), order), index, experts)


def _handed_out(
    inner: ExpertBank, experts: nn.Module, hidden: Tensor, index: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return pair outputs, and the middle activations that a bank hands out as it computes."""
    runs: list[Tensor] = []
    inner.middles = runs
    try:
        return pair_outputs(experts, hidden, index), runs
    finally:
        inner.middles = None


def combined(experts: nn.Module, pairs: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Add gated pairs (T, K, H) up to (T, H), bit for bit as the experts module does."""
    gated = pairs * weights.unsqueeze(-1)
    if not is_eager(experts):
        return gated.sum(dim=1).to(pairs.dtype)
    slots = bank_of(experts).slots[index]
    order, (tokens, k) = slots.argsort(dim=1, stable=True), index.shape
    # the eager loop adds experts up in ascending order, one at a time and in the output's dtype:
    # sums of floats depend on both
    by_choice = gated.transpose(0, 1).reshape(k * tokens, -1)
    rows = order * tokens + torch.arange(tokens, device=index.device).unsqueeze(1)
    out = torch.zeros_like(pairs[:, 0])
    for i in range(k):
        out += by_choice.index_select(0, rows[:, i]).to(out.dtype)
    return out


def _by_token(rows: Tensor, index: Tensor, experts: nn.Module) -> Tensor:
    tokens, k = index.shape
    if is_eager(experts):
        return rows.view(k, tokens, -1).transpose(0, 1)
    return rows.view(tokens, k, -1)


class Products(TorchFunctionMode):
    """Sees every product whose right factor is (a part of) a watched weight.

    Attributes:
        seen: left factors, and the watched weight's name.
        made: the products.
    """

    def __init__(self, watched: dict[str, Tensor]):
        super().__init__()
        self.watched = watched
        self.seen: list[tuple[Tensor, str]] = []
        self.made: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            for name, weight in self.watched.items():
                if _is_part(args[1], weight):
                    return self.product(func, args, named, name)
        return func(*args, **named)

    def product(self, func: Any, args: Any, named: dict[str, Any], name: str) -> Any:
        """Compute a product with a watched weight."""
        self.seen.append((args[0], name))
        out = func(*args, **named)
        self.made.append(out)
        return out


def _is_part(tensor: Tensor, whole: Tensor) -> bool:
    """Return whether a tensor reads the memory of a stacked weight."""
    if tensor.dim() < 2 or tensor.dtype != whole.dtype:
        return False
    begin = whole.data_ptr()
    return begin <= tensor.data_ptr() < begin + whole.numel() * whole.element_size()


def weight_of(experts: nn.Module, name: str) -> Tensor:
    """Return a fused weight of a stock module, or of the shell of a bank.

    Raises:
        OutOfReach: the bank holds none.
    """
    weight = getattr(bank_of(experts).shell, name, None)
    if not isinstance(weight, Tensor):
        raise unseen(experts, name)
    return weight


def unseen(experts: nn.Module, what: str) -> OutOfReach:
    """Return the error for products that cannot be watched."""
    implementation = experts_implementation(experts.config) or "eager"
    return OutOfReach(
        f"the {what} of {type(experts).__name__} under the experts implementation "
        f"{implementation!r} cannot be measured: use `eager` or `grouped_mm`, and experts stored "
        "whole or run=materialised"
    )
