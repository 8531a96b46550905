"""Policy form: a bank (or the model's own experts) of which some chosen slots are skipped.

For a token with gate weights w_1 >= ... >= w_K, the tail of rank i is the share of the sum that it
and all lower ranks hold: t_i = (w_i + ... + w_K) / (w_1 + ... + w_K). Slots of rank 2 and below are
skipped iff t_i < threshold, unless the token is protected. The kept gate weights are scaled to the
sum that all K had, as the model's own normalisation would have left it.
"""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from rerail.errors import InputError
from rerail.experts.base import BankSpec, ExpertBank, Stored
from rerail.moe.fused_experts import (
    Dims,
    ExpertWeights,
    Layout,
    dims_of,
    expert_parameters,
    live_sum,
)

log = logging.getLogger(__name__)

BINS = 1 << 14  # thresholds are multiples of 1 / BINS, so that a histogram of tails is exact


def tails(weights: Tensor) -> Tensor:
    """Return t (T, K) of gate weights (T, K), slot by slot, float32; inf for the highest weight."""
    ranked, order = weights.detach().float().sort(dim=1, descending=True, stable=True)
    mass = ranked.flip(1).cumsum(dim=1).flip(1)
    held = mass / mass[:, :1].clamp(min=torch.finfo(mass.dtype).tiny)
    held[:, 0] = math.inf
    return torch.empty_like(held).scatter(1, order, held)


def protected(hidden: Tensor, received: Tensor, valid: Tensor, share: float) -> Tensor:
    """Return bool (T,): the top `share` of each sequence's tokens by ||x||_1 * attention received.

    Args:
        hidden: (T, H) inputs of the experts, T = B * S.
        received: (B, S) mean attention that each token receives.
        valid: (B, S), false for tokens that do not count.
        share: of the valid tokens of a sequence, rounded up.
    """
    norm = hidden.detach().float().abs().sum(dim=1).view_as(received)
    importance = (norm * received).masked_fill(~valid, -math.inf)
    rank = importance.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    count = (valid.sum(dim=1, keepdim=True) * share - 1e-9).ceil()
    return ((rank < count) & valid).flatten()


class Bank(ExpertBank):
    """Wraps whatever answers the layer. Solved tensor: `threshold`, int64 (1,), in 1 / BINS.

    Options: `router`, the hash of the router that the threshold was fitted on; `protect`, the share
    of tokens of a sequence that are never skipped for.

    Attributes:
        inner: what it wraps.
        watches: whether it wants `received`: set by a hook on the layer's attention before every
            forward, and used up by it.
        active: int64 (T,), the experts that were computed for each token of the last forward.
    """

    wraps: ClassVar[bool] = True

    threshold: Tensor

    def __init__(
        self,
        spec: BankSpec,
        slots: Sequence[int],
        layer: int,
        stocks: Mapping[int, nn.Module],
        tensors: Mapping[str, Tensor],
    ):
        nn.Module.__init__(self)  # what it wraps knows its own sizes and slots
        self.spec, self.layer, self.inner = spec, layer, stocks[layer]
        device = next(iter(self.inner.parameters())).device
        rows = torch.tensor(slots, dtype=torch.int64, device=device)
        self.dims = (
            dims_of(self.inner) if not isinstance(self.inner, ExpertBank) else self.inner.dims
        )
        rows = rows if not isinstance(self.inner, ExpertBank) else self.inner.slots
        self.register_buffer("slots", rows, persistent=False)
        self.register_buffer("threshold", tensors["threshold"].to(device))
        self.protect = float(spec.options.get("protect", "0"))
        self.watches = self.protect > 0
        self.received: tuple[Tensor, Tensor] | None = None
        self.active: Tensor | None = None

    @property
    def shell(self) -> nn.Module:  # type: ignore[override]
        """What finally computes."""
        return self.inner.shell if isinstance(self.inner, ExpertBank) else self.inner

    @property
    def layout(self) -> Layout:
        """The family's layout."""
        return Layout.of(self.shell)

    @staticmethod
    def predicted(spec: BankSpec, layer: int, dims: Dims) -> Stored:  # noqa: ARG004
        """Return nothing: a policy stores no expert."""
        return {}

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:  # noqa: ARG004
        """Return the shape of the threshold."""
        return {"threshold": (1,)}

    def dense(self) -> dict[str, Tensor]:
        """Return the fused tensors of what it wraps."""
        if isinstance(self.inner, ExpertBank):
            return self.inner.dense()
        return dict(expert_parameters(self.inner))

    def stored(self) -> Stored:
        """Count what it wraps."""
        if isinstance(self.inner, ExpertBank):
            return self.inner.stored()
        return {((self.layer, e, 1.0),): self.dims.expert for e in range(self.num_experts)}

    def stored_bits(self, width: int) -> Stored:
        """Count the bits of what it wraps."""
        if isinstance(self.inner, ExpertBank):
            return self.inner.stored_bits(width)
        return super().stored_bits(width)

    def numbers_used(self, chosen: float) -> float:
        """Count what it wraps."""
        if isinstance(self.inner, ExpertBank):
            return self.inner.numbers_used(chosen)
        return chosen * self.dims.expert

    def as_stock(self) -> nn.Module:
        """Refuse: plain experts compute every slot.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"layer {self.layer} skips slots by a policy, and plain experts compute them all; "
            "use export.form=package or remote, or export the model without its policy"
        )

    def materialise(self, slot: int) -> ExpertWeights:
        """Return the expert that answers a slot where it is not skipped."""
        if isinstance(self.inner, ExpertBank):
            return self.inner.materialise(slot)
        return super().materialise(slot)

    def skipped(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Return bool (T, K): the slots that this forward leaves out."""
        found = tails(weights) < self.threshold / BINS
        if not self.watches:
            return found
        seen, self.received = self.received, None
        if seen is None or seen[1].numel() != len(hidden):
            _say_unprotected()
            return found
        return found & ~protected(hidden, *seen, self.protect).unsqueeze(1)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Answer the slots that are kept; the others are not computed."""
        skip = self.skipped(hidden, weights)
        if bool(skip.any()):
            weights = rescaled(weights, skip)
        out = live_sum(self.inner, hidden, index, weights, ~skip)
        self.active = (~skip).sum(dim=1)
        if (below := getattr(self.inner, "active", None)) is not None:
            rows = (~skip).nonzero()[:, 0] if len(below) != len(hidden) else None
            zeros = torch.zeros_like(self.active)
            self.active = below if rows is None else zeros.index_add(0, rows, below)
        return out


def rescaled(weights: Tensor, skip: Tensor) -> Tensor:
    """Return gate weights, 0 where skipped and the others scaled to the same sum."""
    kept = weights.float().masked_fill(skip, 0)
    total = weights.float().sum(dim=1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    return (kept * (total / kept.sum(dim=1, keepdim=True).clamp(min=tiny))).to(weights.dtype)


@functools.cache
def _say_unprotected() -> None:
    log.warning(
        "the attention that tokens receive is not known here (only eager attention has it), so the "
        "skipping policy protects no token"
    )
