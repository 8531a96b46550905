"""MoNE: redundant experts become constants, called novices (arXiv 2507.00390).

An expert whose output hardly varies, or that is hardly used, is replaced by its mean output. With
f_e(x) (H,) the output before the gate, g_e(x) the gate weight, X_e the tokens routed to e, c_e
their number:

    var_e  = || sqrt( sum_{X_e} (f_e - mean_e)^2 / (c_e - 1) ) ||_2    (per coordinate, then over H)
    freq_e = sum_{X_e} g_e            (`freq_mode=sum`)   or   sum_{X_e} g_e / c_e   (`mean`)
    score_e = var_e * freq_e,  the lowest go
    N_e = sum_{X_e} f_e / c_e         (`novice=mean`),  0 for an expert that was never routed to

and a token that chose e gets g_e(x) N_e: router, choice and gate weights are untouched. A novice
costs H numbers, so the achieved ratio lies a little below the share of experts removed.

Where paper and code differ. The paper's notes divide freq by c_e; the code does not (its default,
and here). The code's running variance skips an expert's first batch and mixes n with n - 1; here
it comes from exact moments. With ties the code drops more experts than asked; here ties keep the
lower id. Its test-time update of novices averages inputs, not outputs, and is left out.
`novice=gate2_mean`, sum g^2 f / sum g^2, is not in the paper: it minimises the squared error that
the layer makes. `novice=zero` is its ablation: the expert's share of the sum is dropped.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Compressor, Decision, untouched
from rerail.compress.router_rows import best_slots
from rerail.experts.base import BankSpec
from rerail.moe.model import MoELayer
from rerail.statistics.routed import Count, GatedOutput, Moment, OutputSumRouted
from rerail.statistics.statistic import LayerStatistics, RoutedStatistic, RoutedTokens, Statistic

ROUNDING = 1e-6  # of the squares, which are of float32 outputs: less is no spread


@dataclass(frozen=True)
class OutputSquares(RoutedStatistic):
    """sum over X_e of f^2, coordinate by coordinate. float64 (E, H)."""

    axes = "E H"
    needs = frozenset({"outputs"})

    def measure(self, tokens: RoutedTokens) -> Tensor:
        return tokens.sum_runs(torch.square, tokens.sorted_outputs)


@dataclass(frozen=True, kw_only=True)
class MoNE(Compressor):
    """Keeps the experts of the highest scores and puts constants in the place of the others.

    Attributes:
        novice: the constant: `mean`, `gate2_mean` or `zero`.
        freq_mode: usage as `sum` of gate weights (the code) or their `mean` over routed tokens.
    """

    novice: Literal["mean", "gate2_mean", "zero"] = "mean"
    freq_mode: Literal["sum", "mean"] = "sum"

    paradigm: ClassVar[str] = "pruning"
    paper: ClassVar[str] = "arXiv 2507.00390"

    @property
    def written_out(self) -> Literal["no", "yes", "never"]:
        return "yes"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        base = (Count(), Moment(1, 0), OutputSumRouted(), OutputSquares())
        gated = (Moment(2, 0), GatedOutput(2))
        return base + gated if self.novice == "gate2_mean" else base

    def decide_layer(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Decision:
        """Keep the highest scores; the others' novices are stored behind them."""
        kept = best_slots(self.compared(layer, statistics), count)
        others = [e for e in range(layer.num_experts) if e not in kept]
        place = {e: i for i, e in enumerate((*kept, *others))}
        spec = BankSpec("novice", layer.num_experts, (), {"kept": kept})
        slots = tuple(place[e] for e in range(layer.num_experts))
        novices = self.constants(statistics)[torch.tensor(others, dtype=torch.int64)].float()
        return Decision(replace(untouched(layer, spec), slots=slots), {"novices": novices})

    def compared(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return var * freq, float64 (E,)."""
        count = statistics[Count()].double()
        total, squares = statistics[OutputSumRouted()], statistics[OutputSquares()]
        often = count.clamp(min=1).unsqueeze(1)
        about_mean = squares - total.square() / often
        about_mean = about_mean.masked_fill(about_mean < ROUNDING * squares, 0)
        spread = (about_mean.sum(dim=1) / (count - 1).clamp(min=1)).sqrt()
        mass = statistics[Moment(1, 0)]
        return spread * (mass if self.freq_mode == "sum" else mass / count.clamp(min=1))

    def constants(self, statistics: LayerStatistics) -> Tensor:
        """Return N_e, float64 (E, H)."""
        total, count = statistics[OutputSumRouted()], statistics[Count()].double()
        if self.novice == "gate2_mean":
            total, count = statistics[GatedOutput(2)], statistics[Moment(2, 0)]
        tiny = torch.finfo(torch.float64).tiny
        mean = total / count.clamp(min=tiny).unsqueeze(1)
        return torch.zeros_like(mean) if self.novice == "zero" else mean
