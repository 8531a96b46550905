"""CAMERA-P: pruning of micro-experts (arXiv 2508.02322, AAAI 2026).

An expert is a sum of I micro-experts: channel j of expert e adds phi_ej(x) down_e[:, j], with
phi_ej(x) = g_e(x) act(gate_j x) up_j x (0 where x is not routed to e). Its energy is

    E_ej = [ (1 - alpha) sum_x phi_ej(x)^2 + alpha max_x phi_ej(x)^2 ] ||down_e[:, j]||_2^2

over the calibration tokens x; g_e is the gate weight that the model multiplied in, after its own
normalisation. At alpha = 0 it is the squared change of the layer's output, summed over tokens,
when that one channel is deleted. All N = E I micro-experts of a layer are ranked together and the
int(N * ratio) lowest are dropped, experts becoming narrower by different amounts. Layers are
planned in order, each measured on the model whose earlier layers are compressed already.

Where the paper and its code differ, and what stands here:
* alpha: the code's default is 1.0, its scripts run with 0.9 (`alpha`, default 0.9). The maximum
  and the sum grow differently with the number of tokens; neither is normalised, as in the code.
* the code sets k = 8 and renormalised gates by hand for qwen3; here they are the model's.
* the code only zeroes weights; here the channels are gone. Its sums are bf16, here float64.
* the code ranks shared experts together with routed ones (gate 1, or their sigmoid gate); here
  shared experts stay whole, and the ratio counts routed experts only.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rerail.compress.solvers.energy import check_alpha, energy_statistics, micro_expert_energy
from rerail.compress.templates.narrower import Narrower
from rerail.moe.model import MoELayer
from rerail.statistics.statistic import LayerStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class Camera(Narrower):
    """Keeps the micro-experts of the highest energy.

    Attributes:
        alpha: in [0, 1], how much the largest activation counts beside their sum.
    """

    alpha: float = 0.9

    paper: ClassVar[str] = "arXiv 2508.02322"
    driver = "sequential"

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return energy_statistics(self.alpha)

    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        return micro_expert_energy(layer, statistics, self.alpha)
