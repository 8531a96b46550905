"""Skippers: every expert is kept, some chosen slots are not computed. Open: `threshold`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Compressor, Decision, Layers, Statistics, make_plan, untouched
from rerail.errors import InputError, OutOfReach
from rerail.experts.base import BankSpec
from rerail.experts.skip_policy import BINS, tails
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.allocation import Allocation, Uniform
from rerail.plan.budget import Budget, Skip
from rerail.plan.plan import Plan
from rerail.statistics.statistic import (
    LayerStatistics,
    RoutedStatistic,
    RoutedTokens,
    StatisticSet,
)


@dataclass(frozen=True)
class GateTails(RoutedStatistic):
    """Histogram over all tokens of the tails of ranks 2 to K. int64 (BINS,).

    The tail of rank i is (w_i + ... + w_K) / (w_1 + ... + w_K), w the gate weights in falling
    order; with K = 2 it is r / (1 + r) for the ratio r = w_2 / w_1. Bin b counts tails in
    [b, b + 1) / BINS, BINS a power of two, so that what lies below a threshold is exact.
    """

    def empty(self, layer: MoELayer) -> Tensor:
        return torch.zeros(BINS, dtype=torch.int64)

    def measure(self, tokens: RoutedTokens) -> Tensor:
        shares = tails(tokens.gates).flatten()
        lower = shares[torch.isfinite(shares)]
        place = (lower * BINS).floor().long().clamp(max=BINS - 1)
        return torch.bincount(place, minlength=BINS)


@dataclass(frozen=True, kw_only=True)
class Skipper(Compressor):
    """Fits one threshold a layer; a count is of activations skipped on the calibration text.

    A threshold is a statistic of what the router says, so it is worth something on that router
    only: a plan carries the router's hash and is refused on another one. After a repair the run
    calls `refit`.

    Attributes:
        allow_stale: leave the hash out, so that thresholds fit any router.
    """

    allow_stale: bool = False

    paradigm: ClassVar[str] = "skipping"
    budget: ClassVar[type[Budget]] = Skip
    allocations: ClassVar[Literal["any", "fixed", "uniform"]] = "uniform"

    requires = (GateTails(),)

    @property
    def written_out(self) -> Literal["no", "yes", "never"]:
        return "never"

    def threshold(self, tails: Tensor) -> float:
        """Return the method's own threshold, for where no share is asked for: the median tail.

        Args:
            tails: int64 (BINS,), the filled GateTails of a layer.
        """
        return float(nearest(tails, int(tails.sum()) // 2)) / len(tails)

    def policy_options(self) -> Mapping[str, str]:
        """Return further options of the policy bank; none by default."""
        return {}

    def allocate(
        self, layers: Layers, statistics: Statistics, budget: Budget, allocation: Allocation
    ) -> list[int]:
        """Return how many activations each layer skips, protected tokens included.

        Each token keeps its first slot, so K - 1 of K can be skipped.
        """
        for layer in layers:
            self._check_share(layer, budget.removed)
        if statistics is None:  # how many there are is not known yet
            return [0] * len(layers)
        views = [statistics.of(layer, self.requires) for layer in layers]
        pairs = zip(layers, views, strict=True)
        return [self._num_skipped(la, view[GateTails()], budget.removed) for la, view in pairs]

    def _check_share(self, layer: MoELayer, share: float | None) -> None:
        most = (layer.top_k - 1) / layer.top_k
        if most == 0 or (share or 0) > most:
            asked = "by its rule" if share is None else f"{share} of activations"
            raise OutOfReach(
                f"{type(self).__name__} cannot skip {asked} in layer {layer.index}: each of "
                f"its tokens keeps one of {layer.top_k} experts; allowed shares: from 0 to "
                f"{most:.4g}"
            )

    def _num_skipped(self, layer: MoELayer, tails: Tensor, share: float | None) -> int:
        lower = int(tails.sum())  # activations of ranks 2 to K: K - 1 of all K
        if lower == 0:
            raise InputError(f"layer {layer.index}: no token to fit a threshold on; give some")
        if share is None:
            return below(tails, self.threshold(tails))
        return round(share * lower * layer.top_k / (layer.top_k - 1))

    def decide_layer(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Decision:
        """Put a policy around the experts that a layer has."""
        router = {} if self.allow_stale else {"router": layer.router_hash()}
        options = {**router, **self.policy_options()}
        spec = BankSpec("skip_policy", layer.num_experts, (), {}, options)
        threshold = nearest(statistics[GateTails()], count)
        return Decision(untouched(layer, spec), {"threshold": threshold})

    def refit(
        self, student: MoEModel, measure: Callable[[MoEModel], StatisticSet], budget: Budget
    ) -> Plan:
        """Return the policies fitted anew on the student's router as it stands.

        They are for `apply_plan(without_policies(student), plan)`.

        Args:
            student: with or without policies.
            measure: returns the statistics that `requires` names, of the model that it is given.
            budget: as for the first fit.
        """
        plain = without_policies(student)
        return make_plan(self, plain.layers, measure(plain), budget, Uniform())


def below(tails: Tensor, threshold: float) -> int:
    """Return how many tails lie below a threshold, to the bin."""
    return int(tails[: round(threshold * BINS)].sum())


def nearest(tails: Tensor, count: int) -> Tensor:
    """Return the threshold, int64 (1,) in 1 / BINS, below which nearest to `count` tails lie.

    Where all of them are asked for, it lies above any tail.
    """
    if count >= int(tails.sum()):
        return torch.tensor([len(tails)])
    under = torch.cat([torch.zeros(1, dtype=torch.int64), tails.cumsum(0)])
    return (under - count).abs().argmin().reshape(1)


def without_policies(student: MoEModel) -> MoEModel:
    """Return the student as it computes without skipping; every Parameter is shared."""
    plain = student.with_shared_parameters()
    for layer in plain.layers:
        layer.swap(layer.bank.unwrapped())
    return plain


def check_fitted(student: MoEModel) -> None:
    """Check that every policy of a student was fitted on the router that it has now.

    Raises:
        InputError: a router changed since.
    """
    for layer in student.layers:
        layer.check_router(layer.bank.spec.options.get("router", ""))
