"""CAMERA-Q: micro-experts of the highest energy get the most bits (arXiv 2508.02322, AAAI 2026).

The three vectors of a micro-expert, row j of gate and up and column j of down, share one bit width.
With the energy E_ej of `rerail.methods.camera`, all N = E I micro-experts of a layer are put in the
order of E and cut into classes of b_1 > b_2 > b_3 bits, layer after layer, each measured on the
model whose earlier layers are quantised already.

A budget is the average bits of a number, and here scales and zeros count (16 bits each, for every
`group` numbers along H): a channel of b bits takes 3 (H b + 16 z H / G), z = 2, and 1 for one bit.

The paper does not print the shares of its classes (3/2/1 bits at 2.25 on average; its CLI has 8/4/2
at 0.1/0.3/0.6), and its code has no quantiser. Ours:

    shares     those that minimise sum_ej E_ej 4^-b_ej within the budget, exactly, over all choices
               of up to three classes among `bits`; or `shares`, one for each of `bits`
    quantiser  GPTQ, HQQ or RTN. Groups lie along H, also for down; GPTQ takes its columns from the
               most bits to the fewest, so that errors move on to the lesser channels

Bits may be 16, and 0 drops a channel. The code ranks shared experts too; here they stay whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rerail.compress.base import Compressor, Decision
from rerail.compress.solvers.channel_classes import (
    best_classes,
    bits_by_rank,
    check_average,
    check_classes,
    counts_by_shares,
)
from rerail.compress.solvers.energy import check_alpha, energy_statistics, micro_expert_energy
from rerail.compress.templates.channel_quantiser import channels_quantised
from rerail.compress.templates.quantiser import WIDTHS, Quantiser
from rerail.experts.packed_channels import channel_bits
from rerail.experts.quantized import DENSE
from rerail.moe.model import MoELayer
from rerail.plan.budget import Bits, Budget, numbers_kept
from rerail.statistics.statistic import LayerStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class CameraQ(Compressor):
    """Gives micro-experts bits by their energy; a count is of the bits of a layer's matrices.

    Attributes:
        quantiser: what encodes a class once its bits are known, and the group G.
        bits: the candidate classes, falling.
        shares: of the classes, all of them to be listed; None for the best.
        alpha: in [0, 1], how much the largest activation counts beside their sum.
    """

    quantiser: Quantiser
    bits: Sequence[int] = (8, 4, 3, 2, 1)
    shares: Sequence[float] | None = None
    alpha: float = 0.9

    paradigm: ClassVar[str] = "quantisation"
    paper: ClassVar[str] = "arXiv 2508.02322"
    budget: ClassVar[type[Budget]] = Bits
    allocations = "uniform"
    driver = "sequential"
    written_out = "yes"

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_classes(self.bits, self.shares, (0, *WIDTHS))

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return tuple(dict.fromkeys(energy_statistics(self.alpha) + self.quantiser.requires))

    def costs(self, layer: MoELayer) -> dict[int, int]:
        """Return the bits of one channel by its class."""
        return {b: channel_bits(b, layer.hidden_size, self.quantiser.group) for b in self.bits}

    def count(self, layer: MoELayer, removed: float) -> int:
        channels = layer.num_experts * layer.intermediate_size
        numbers, costs = 3 * layer.hidden_size * channels, self.costs(layer)
        shared = counts_by_shares(channels, self.bits, self.shares or [0.0] * len(self.bits))
        lowest = sum(n * costs[b] for b, n in shared.items()) / numbers
        check_average(DENSE * (1 - removed), lowest, costs[self.bits[0]] * channels / numbers)
        return numbers_kept(DENSE * numbers, removed)

    def decide_layer(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Decision:
        energy = micro_expert_energy(layer, statistics, self.alpha)
        if self.shares is None:
            counts = best_classes(energy, self.costs(layer), count)
        else:
            counts = counts_by_shares(energy.numel(), self.bits, self.shares)
        return channels_quantised(layer, statistics, bits_by_rank(energy, counts), self.quantiser)
