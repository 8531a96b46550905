"""Narrowers: every expert is kept, with fewer channels. One function is open: `score`."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Compressor, Decision, untouched
from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec
from rerail.experts.narrow import NarrowExperts
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer
from rerail.plan.budget import dense_numbers, units_kept
from rerail.statistics.statistic import LayerStatistics

_BIAS = "gate_up_proj_bias"


@dataclass(frozen=True, kw_only=True)
class Narrower(Compressor):
    """Drops the micro-experts of lowest score of a layer; a count is of those that it keeps.

    A micro-expert is one channel of one expert: row j of gate and up, column j of down. All E I of
    a layer compete, so widths are ragged; an expert of width 0 can still be chosen and answers 0
    (or its down bias). Shared experts are left as they are.

    Of N = E I micro-experts int(N * ratio) go. Where a down bias stays dense (gpt_oss), as many
    more go as bring the layer to its share of bytes, rounded down in whole micro-experts.
    """

    paradigm: ClassVar[str] = "editing"
    allocations: ClassVar[Literal["any", "fixed", "uniform"]] = "fixed"

    @abstractmethod
    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return (E, I), higher means keep; a channel that was never active scores lowest."""

    def count(self, layer: MoELayer, removed: float) -> int:
        """Return how many micro-experts a layer keeps: at least one."""
        whole = dense_numbers(layer) / micro_size(layer)
        units = layer.num_experts * layer.intermediate_size
        num_kept = units_kept(units, removed, whole)
        if not 1 <= num_kept <= units:
            raise OutOfReach(
                f"layer {layer.index} cannot lose {removed:.4g} of its numbers by channels; "
                f"allowed ratios: 0 to {(units - 1) / whole:.4g}"
            )
        return num_kept

    def decide_layer(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Decision:
        spec, solved = narrowed(layer, highest(self.score(layer, statistics), count))
        return Decision(untouched(layer, spec), solved)


def micro_size(layer: MoELayer) -> int:
    """Return the numbers of one micro-expert: 3 H, and its two biases where there are some."""
    touched = NarrowExperts.touched(_spec(layer, ()))
    return sum(layer.dims.numbers[name] for name in touched) // layer.intermediate_size


def highest(score: Tensor, count: int) -> Tensor:
    """Return bool, shaped as `score`, true at its `count` highest; ties keep the lower position."""
    order = torch.argsort(score.flatten(), descending=True, stable=True)
    kept = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    kept[order[:count]] = True
    return kept.view(score.shape)


def narrowed(layer: MoELayer, kept: Tensor) -> tuple[BankSpec, dict[str, Tensor]]:
    """Return the narrow form of a layer, and its tensors, for the kept channels (E, I)."""
    gate, up, down = layer.stack()
    kept = kept.to(gate.device)
    tensors = {"gate": gate[kept], "up": up[kept], "down": down.mT[kept]}
    if _BIAS in layer.dims.numbers:
        bias = expert_parameters(layer.stock())[_BIAS].detach()
        column = bias.unsqueeze(1) if layer.layout.transposed else bias.unsqueeze(2)
        gate, up, _ = layer.layout.unpack(column, column)
        tensors |= {"gate_bias": gate[..., 0][kept], "up_bias": up[..., 0][kept]}
    return _spec(layer, tuple(kept.sum(dim=1).tolist())), tensors


def _spec(layer: MoELayer, widths: tuple[int, ...]) -> BankSpec:
    options = {"biases": "gate+up"} if _BIAS in layer.dims.numbers else {}
    return BankSpec("narrow", layer.num_experts, (), {"widths": widths}, options)
