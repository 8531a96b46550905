"""Skippers: every expert is kept, some chosen slots are not computed. Open: `threshold`."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerail.compress.base import Decision, LayerWise, make_plan, untouched
from rerail.errors import InputError, OutOfReach
from rerail.experts.base import BankSpec
from rerail.experts.skip_policy import BINS
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.allocation import Allocation, Uniform
from rerail.plan.budget import Skip
from rerail.plan.plan import Plan
from rerail.statistics.gate_ratios import GateTails
from rerail.statistics.statistic import LayerStatistics, Statistic, StatisticSet


@dataclass(frozen=True, kw_only=True)
class Skipper(LayerWise):
    """Fits one threshold a layer; a share counts activations skipped on the calibration text.

    A threshold is a statistic of what the router says, so it is worth something on that router
    only: a plan carries the router's hash and is refused on another one. After a repair the run
    calls `refit`.

    Attributes:
        allow_stale: leave the hash out, so that thresholds fit any router.
    """

    allow_stale: bool = False

    paradigm: ClassVar[str] = "skipping"
    budget: ClassVar[type] = Skip

    @property
    def requires(self) -> tuple[Statistic, ...]:
        """The tails of gate weights."""
        return (GateTails(),)

    @abstractmethod
    def threshold(self, layer: MoELayer, tails: Tensor) -> float:
        """Return the method's own threshold for tails, used where no share is asked for.

        Args:
            layer: the layer.
            tails: int64 (BINS,), the filled GateTails of the layer.
        """

    def words(self) -> Mapping[str, str]:
        """Return further options of the policy bank; none by default."""
        return {}

    def check(self, layers: Sequence[MoELayer], ratio: Skip, allocation: Allocation) -> None:
        """Each token keeps its first slot, so K - 1 of K can be skipped."""
        if not isinstance(allocation, Uniform):
            raise OutOfReach(
                f"allocation {allocation} counts experts, and {type(self).__name__} keeps them "
                "all; use allocation=uniform"
            )
        for layer in layers:
            most = (layer.top_k - 1) / layer.top_k
            if most == 0 or (ratio.share or 0) > most:
                asked = "by its rule" if ratio.share is None else f"{ratio.share} of activations"
                raise OutOfReach(
                    f"{type(self).__name__} cannot skip {asked} in layer {layer.index}: each of "
                    f"its tokens keeps one of {layer.top_k} experts; allowed shares: from 0 to "
                    f"{most:.4g}"
                )

    def allocate(
        self,
        layers: Sequence[MoELayer],
        statistics: StatisticSet,
        ratio: Skip,
        allocation: Allocation,
    ) -> list[int]:
        """Return how many activations each layer skips, protected tokens included."""
        counts = []
        for layer in layers:
            tails = statistics.of(layer, self.requires)[GateTails()]
            k, lower = layer.top_k, int(tails.sum())
            if lower == 0:
                raise InputError(f"layer {layer.index}: no token to fit a threshold on; give some")
            if ratio.share is None:
                counts.append(below(tails, self.threshold(layer, tails)))
            else:
                counts.append(round(ratio.share * lower * k / (k - 1)))
        return counts

    def decide(self, layer: MoELayer, statistics: LayerStatistics, share: int) -> Decision:
        """Return the policy around the experts that the layer has."""
        router = {} if self.allow_stale else {"router": layer.router_hash()}
        spec = BankSpec("skip_policy", layer.num_experts, (), {}, {**router, **self.words()})
        threshold = nearest(statistics[GateTails()], share)
        return Decision(untouched(layer, spec), {"threshold": threshold})

    def refit(
        self, student: MoEModel, measure: Callable[[MoEModel], StatisticSet], ratio: Skip
    ) -> Plan:
        """Return the policies fitted anew on the student's router as it stands.

        They are for `apply_plan(without_policies(student), plan)`.

        Args:
            student: with or without policies.
            measure: returns the statistics that `requires` names, of the model that it is given.
            ratio: as for the first fit.
        """
        plain = without_policies(student)
        return make_plan(self, plain.layers, measure(plain), ratio, Uniform())


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
