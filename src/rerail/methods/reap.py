"""REAP: Router-weighted Expert Activation Pruning (arXiv 2510.13999, eq. 9), and its relatives.

An expert matters as much as what it adds where it is used: over the tokens X_e routed to it,

    S_e(b, a, p) = sum_{x in X_e} g_e(x)^a ||f_e(x)||_2^p / c_e^b,    REAP: (b, a, p) = (1, 1, 1)

with gate weight g_e(x) (after the model's own normalisation), output f_e(x) before the gate and
c_e = |X_e|. The int(E * ratio) lowest scores of each layer are removed; experts that were never
routed to score 0 and go first. The mean is taken over tokens, not a product of two means.

The paper assumes gates normalised over the chosen experts. Its code recomputes a softmax over all
experts and renormalises it where the model does; here the gate is the one the model multiplied in,
which also holds for sigmoid routers. `sequential` is the order of llm-compressor: each layer is
measured on the model whose earlier layers are pruned already.

Relatives are presets of the same score (the family is that of arXiv 2606.15716):

    frequency (0, 0, 0) usage count          seer_moe  (0, 1, 0) soft count (arXiv 2404.05089)
    ean       (0, 0, 1) arXiv 2504.05586     gated_ean (0, 1, 1)
    man       (1, 0, 1) arXiv 2606.15716     msan      (1, 0, 2) arXiv 2606.15716
    gated_l2  (0, 2, 2) task-specific        reap_l2   (1, 2, 2) inferred from its name

SEER-MoE ranks across layers (allocation=global; its own second stage, a fine-tuned gate with an
entropy penalty, is not part of the score). REAP's code advertises reap_l2 and weighted_ean_sum_l2
and computes neither, so the powers of the last two presets are inferred.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rerail.compress.templates.pruner import Pruner
from rerail.moe.model import MoELayer
from rerail.statistics.routed import Count, Moment
from rerail.statistics.statistic import LayerStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class MomentScore(Pruner):
    """Keeps the experts of the highest S_e; REAP by its defaults, its relatives by other powers.

    Attributes:
        mean: divide by the count of routed tokens (b = 1).
        gate_power: a.
        norm_power: p.
    """

    mean: bool = True
    gate_power: int = 1
    norm_power: int = 1

    paper: ClassVar[str] = "arXiv 2510.13999"

    @property
    def measures(self) -> tuple[Statistic, ...]:
        moment = Moment(self.gate_power, self.norm_power)
        return (moment, Count()) if self.mean else (moment,)

    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        total = statistics[Moment(self.gate_power, self.norm_power)]
        return total / statistics[Count()].clamp(min=1) if self.mean else total
