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
from rerail.plan.budget import dense_numbers, numbers_kept, units_kept
from rerail.statistics.statistic import LayerStatistics

_BIAS = "gate_up_proj_bias"


@dataclass(frozen=True, kw_only=True)
class Narrower(Compressor):
    """Drops the micro-experts of lowest score of a layer; a count is of those that it keeps.

    A micro-expert is one channel of one expert: row j of gate and up, column j of down. Shared
    experts are left as they are.

    Ragged: all N = E I of a layer compete, and int(N * ratio) of them go; an expert of width 0 can
    still be chosen and answers 0 (or its down bias). Where a down bias stays dense (gpt_oss), as
    many more go as bring the layer to its share of bytes, rounded down in whole micro-experts.

    Uniform: the channels of each expert compete among themselves, and each keeps as many as leave
    the layer at its share of bytes or below, int((1 - ratio) I) without a down bias. Stock
    transformers reads such experts as experts of a smaller width.

    Attributes:
        widths: whether the experts of a layer get widths of their own or one for all.
    """

    widths: Literal["ragged", "uniform"] = "ragged"

    paradigm: ClassVar[str] = "editing"
    allocations: ClassVar[Literal["any", "fixed", "uniform"]] = "fixed"

    @abstractmethod
    def score(self, layer: MoELayer, statistics: LayerStatistics) -> Tensor:
        """Return (E, I), higher means keep; a channel that was never active scores lowest."""

    def refitted(self, layer: MoELayer, statistics: LayerStatistics, kept: Tensor) -> Tensor:
        """Return down (E, H, I), of which the kept channels (E, I) are stored; by default as is."""
        return layer.stack().down

    def count(self, layer: MoELayer, removed: float) -> int:
        """Return how many micro-experts a layer keeps: at least one, or one in every expert."""
        whole, size = dense_numbers(layer), micro_size(layer)
        units = layer.num_experts * layer.intermediate_size
        least = layer.num_experts if self.widths == "uniform" else 1
        num_kept = units_kept(units, removed, whole / size)
        if self.widths == "uniform":
            free = numbers_kept(whole, removed) - (whole - units * size)
            num_kept = free // (least * size) * least
        if not least <= num_kept <= units:
            raise OutOfReach(
                f"layer {layer.index} cannot lose {removed:.4g} of its numbers by channels; "
                f"allowed ratios: 0 to {(units - least) * size / whole:.4g}"
            )
        return num_kept

    def decide_layer(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Decision:
        score = self.score(layer, statistics)
        if self.widths == "uniform":
            each = count // layer.num_experts
            kept = torch.stack([highest(own, each) for own in score])
        else:
            kept = highest(score, count)
        spec, solved = narrowed(layer, kept, self.refitted(layer, statistics, kept))
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


def narrowed(
    layer: MoELayer, kept: Tensor, down: Tensor | None = None
) -> tuple[BankSpec, dict[str, Tensor]]:
    """Return the narrow form of a layer, and its tensors, for the kept channels (E, I).

    Args:
        layer: its gate, up and biases are stored as they are.
        kept: bool.
        down: (E, H, I) in the place of the layer's own.
    """
    gate, up, own = layer.stack()
    kept, down = kept.to(gate.device), own if down is None else down.to(own)
    tensors = {"gate": gate[kept], "up": up[kept], "down": down.mT[kept]}
    tensors |= {name: bias[kept] for name, bias in middle_biases(layer).items()}
    return _spec(layer, tuple(kept.sum(dim=1).tolist())), tensors


def middle_biases(layer: MoELayer) -> dict[str, Tensor]:
    """Return gate_bias and up_bias (E, I), where the family has some."""
    if _BIAS not in layer.dims.numbers:
        return {}
    bias = expert_parameters(layer.stock())[_BIAS].detach()
    column = bias.unsqueeze(1) if layer.layout.transposed else bias.unsqueeze(2)
    gate, up, _ = layer.layout.unpack(column, column)
    return {"gate_bias": gate[..., 0], "up_bias": up[..., 0]}


def _spec(layer: MoELayer, widths: tuple[int, ...]) -> BankSpec:
    options = {"biases": "gate+up"} if _BIAS in layer.dims.numbers else {}
    return BankSpec("narrow", layer.num_experts, (), {"widths": widths}, options)
