"""Skipping form: a bank (or the model's own experts) of which some chosen slots are skipped.

For a token with gate weights w_1 >= ... >= w_K, the tail of rank i is the share of the sum that it
and all lower ranks hold: t_i = (w_i + ... + w_K) / (w_1 + ... + w_K). Slots of rank 2 and below are
skipped iff t_i < threshold, unless the token is protected. The kept gate weights are scaled to the
sum that all K had, as the model's own normalisation would have left it.
"""

import functools
import logging
import math

import torch
from torch import Tensor, nn

from rerail.errors import InputError
from rerail.experts.base import BankParts, BankSpec, ExpertBank, Stored, StoredForm, bank_of
from rerail.moe.fused_experts import Dims, ExpertWeights, live_sum

log = logging.getLogger(__name__)

BINS = 1 << 14  # thresholds are multiples of 1 / BINS, so that a histogram of tails is exact


def tails(weights: Tensor) -> Tensor:
    """Return t (T, K) of gate weights (T, K), slot by slot, float32; inf for the highest weight."""
    ranked, order = weights.detach().float().sort(dim=1, descending=True, stable=True)
    # summed from the smallest weight up
    mass = ranked.flip(1).cumsum(dim=1).flip(1)
    tail = mass / mass[:, :1].clamp(min=torch.finfo(mass.dtype).tiny)
    tail[:, 0] = math.inf
    return torch.empty_like(tail).scatter(1, order, tail)


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
    # in float64: three tenths of 50 are 15, and a little more than that in float32
    count = (valid.sum(dim=1, keepdim=True).double() * share - 1e-9).ceil()
    return ((rank < count) & valid).flatten()


class SkipPolicy(ExpertBank):
    """Wraps whatever answers the layer. Solved tensor: `threshold`, int64 (1,), in 1 / BINS.

    Options: `router`, the hash of the router that the threshold was fitted on; `protect`, the share
    of tokens of a sequence that are never skipped for.

    Attributes:
        inner: the module that it wraps.
    """

    wraps = True
    whole = False

    threshold: Tensor

    def __init__(self, parts: BankParts):
        nn.Module.__init__(self)  # what it wraps knows its own sizes and slots
        self.spec, self.layer, self.inner = parts.spec, parts.layer, parts.stock
        self.dims, slots_of_inner = self.wrapped.dims, self.wrapped.slots
        self.register_buffer("slots", slots_of_inner, persistent=False)
        self.register_buffer("threshold", parts.tensors["threshold"].to(slots_of_inner.device))
        self.protect = float(parts.spec.options.get("protect", "0"))
        self.watches = self.protect > 0

    @property
    def wrapped(self) -> ExpertBank:
        return bank_of(self.inner, self.layer)

    @property
    def shell(self) -> nn.Module:  # type: ignore[override]
        return self.wrapped.shell

    def nested(self) -> list[ExpertBank]:
        return [*self.wrapped.nested(), self]

    def unwrapped(self) -> nn.Module:
        return self.inner

    @classmethod
    def predicted(cls, spec: BankSpec, layer: int, dims: Dims) -> Stored:  # noqa: ARG003
        return {}

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:  # noqa: ARG004
        return {"threshold": (1,)}

    def dense(self) -> dict[str, Tensor]:
        return self.wrapped.dense()

    def by_slot(self) -> dict[str, Tensor]:
        return self.wrapped.by_slot()

    def materialise(self, slot: int) -> ExpertWeights:
        return self.wrapped.materialise(slot)

    def stored(self) -> Stored:
        return self.wrapped.stored()

    def stored_bits(self, width: int) -> Stored:
        return self.wrapped.stored_bits(width)

    def numbers_used(self, chosen: float) -> float:
        return self.wrapped.numbers_used(chosen)

    def check_plain(self) -> None:
        raise InputError(
            f"layer {self.layer} skips slots by a policy, and plain experts compute them all; "
            "use export.form=package or remote, or export the model without its policy"
        )

    def as_stock(self, width: int | None = None) -> nn.Module:
        self.check_plain()
        return self.wrapped.as_stock(width)

    def stored_form(self) -> StoredForm:
        return StoredForm(self.spec, self.slots.tolist(), {}, self.solved_tensors())

    def skipped(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Return bool (T, K): the slots that this forward leaves out."""
        low = tails(weights) < self.threshold / BINS
        if not self.watches:
            return low
        # used up: the next forward may be one whose attention nobody saw
        seen, self.received = self.received, None
        if seen is None or seen[1].numel() != len(hidden):
            _warn_unprotected()
            return low
        return low & ~protected(hidden, *seen, self.protect).unsqueeze(1)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Answer the slots that are kept; the others are not computed."""
        live = ~self.skipped(hidden, weights)
        all_live = bool(live.all())
        if not all_live:
            weights = rescaled(weights, ~live)
        out = live_sum(self.inner, hidden, index, weights, live)
        self.active = live.sum(dim=1)
        if (below := self.wrapped.active) is not None:
            # what it wraps saw whole tokens, or each live choice as a token of its own
            zeros, tokens = torch.zeros_like(self.active), live.nonzero()[:, 0]
            self.active = below if all_live else zeros.index_add(0, tokens, below)
        return out


def rescaled(weights: Tensor, skip: Tensor) -> Tensor:
    """Return gate weights, 0 where skipped and the others scaled to the same sum."""
    kept = weights.float().masked_fill(skip, 0)
    total = weights.float().sum(dim=1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    return (kept * (total / kept.sum(dim=1, keepdim=True).clamp(min=tiny))).to(weights.dtype)


@functools.cache
def _warn_unprotected() -> None:
    log.warning(
        "the attention that tokens receive is not known here (only eager attention has it), so the "
        "skipping policy protects no token"
    )
