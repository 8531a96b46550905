"""AIMER: expert pruning from the weights alone (arXiv 2603.18492).

An expert whose weights all have about the same size goes first:

    s_e = mean |w| / sqrt(mean w^2)    over all entries of gate, up (I, H) and down (H, I) together,

a number in (0, 1] that does not change when the whole expert is scaled. Higher s_e means prune
first, so the score that keeps is 1 / s_e; biases are left out. No text is needed.

The public code ranks each layer by itself. 1 / s_e is positive, so that allocation=global can rank
shares too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerail.compress.templates.pruner import Pruner
from rerail.moe.fused_experts import ExpertWeights
from rerail.moe.model import MoELayer
from rerail.statistics.statistic import LayerStatistics


@dataclass(frozen=True, kw_only=True)
class AIMER(Pruner):
    """Keeps the experts whose weights differ most in size."""

    paper: ClassVar[str] = "arXiv 2603.18492"

    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        each = [_spread(layer.expert(slot)) for slot in range(layer.num_experts)]
        return torch.stack(each).cpu()


def _spread(expert: ExpertWeights) -> Tensor:
    flat = torch.cat([matrix.flatten() for matrix in expert]).float()
    mean, mean_square = (t.mean(dtype=torch.float64) for t in (flat.abs(), flat.square()))
    return mean_square.sqrt() / mean.clamp(min=1e-30)
