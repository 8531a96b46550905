"""Energy of micro-experts (CAMERA, arXiv 2508.02322): what the output loses without one channel."""

from torch import Tensor

from rerail.errors import InputError
from rerail.moe.model import MoELayer
from rerail.statistics.squares import MiddleEnergy, MiddlePeak
from rerail.statistics.statistic import LayerStatistics, Statistic


def check_alpha(alpha: float) -> None:
    """Check the share of the peak.

    Raises:
        InputError: it is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"compressor.alpha={alpha} is outside [0, 1]")


def energy_statistics(alpha: float) -> tuple[Statistic, ...]:
    """Return what `micro_expert_energy` reads."""
    sums = (MiddleEnergy(),) if alpha < 1 else ()
    return (*sums, MiddlePeak()) if alpha > 0 else sums


def micro_expert_energy(layer: MoELayer, statistics: LayerStatistics, alpha: float) -> Tensor:
    """Return [(1 - alpha) sum (g h_j)^2 + alpha max (g h_j)^2] ||down_j||^2, float64 (E, I)."""
    norms = squared_norms(layer.stack().down).cpu()
    energy = norms.new_zeros(norms.shape)
    if alpha < 1:
        energy = energy + (1 - alpha) * statistics[MiddleEnergy()]
    if alpha > 0:
        energy = energy + alpha * statistics[MiddlePeak()].square()
    return energy * norms


def squared_norms(down: Tensor) -> Tensor:
    """Return ||down_j||^2 of stacked experts (E, H, I), float64 (E, I)."""
    return down.double().square().sum(dim=-2)
