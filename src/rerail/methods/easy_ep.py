"""EASY-EP: few-shot, domain-specific expert pruning (arXiv 2504.06792, section 4).

An expert matters as much as what it adds, at the tokens that the layer changes most:

    S_e = sum_{x in X_e} g_e(x) ||f_e(x)||_2 s(x),    s(x) = max(0, 1 - cos(h, h + y))

with gate weight g_e(x) after normalisation and scaling, output f_e(x) before the gate, h (H,) the
residual stream before the MoE sub-layer and y (H,) the routed output, without shared experts. The
clamp is the code's; it only removes round-off. S is (E,); an expert never routed to scores 0.

All E router rows stay and the dropped experts are never selected (`router=mask`, as the paper
serves the model); `router=slice` drops the rows too. Dropped experts leave the softmax as well, so
that kept gates of routers without renormalisation grow; the public code masks after the softmax on
its softmax branch, which is not offered. On sigmoid routers (DeepSeek-V3, the paper's model) the
two are the same.

The paper calibrates on 25 demonstrations of one domain, prompts with the model's own answers. For
several domains it adds scores that were normalised per domain; here a mixed text gives one score in
which longer and louder domains weigh more.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from rerail.compress.templates.pruner import Pruner
from rerail.moe.model import MoELayer
from rerail.statistics.statistic import LayerStatistics, RoutedStatistic, RoutedTokens


@dataclass(frozen=True)
class Deviation(RoutedStatistic):
    """S_e, with n = ||f_e(x)||_2 as routed tokens have it. float64 (E,)."""

    axes = "E"
    needs = frozenset({"norms", "outputs", "residual"})

    def measure(self, tokens: RoutedTokens) -> Tensor:
        assert tokens.norms is not None
        assert tokens.residual is not None
        assert tokens.routed is not None
        before = tokens.residual.float()
        turned = 1 - F.cosine_similarity(before, before + tokens.routed.float(), dim=-1)
        scale = turned.clamp(min=0).unsqueeze(1)
        return tokens.sum_by_expert(tokens.gates.float() * tokens.norms.float() * scale)


@dataclass(frozen=True, kw_only=True)
class EasyEP(Pruner):
    """Keeps the experts that add most where the layer changes most; `router=mask` by default."""

    router: Literal["slice", "mask"] = "mask"

    paper: ClassVar[str] = "arXiv 2504.06792"

    measures = (Deviation(),)

    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        return statistics[Deviation()]
