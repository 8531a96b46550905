"""Channels of different bits: what a quantiser makes of them, class by class in each expert."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rerail.compress.base import Decision, untouched
from rerail.compress.templates.narrower import middle_biases
from rerail.compress.templates.quantiser import MomentsOf, Quantiser
from rerail.experts.base import BankSpec
from rerail.experts.packed_channels import PackedChannels, channel_classes
from rerail.experts.quantized import DENSE, Coded, pack
from rerail.moe.fused_experts import ExpertWeights
from rerail.moe.model import MoELayer
from rerail.statistics.statistic import LayerStatistics


def channels_quantised(
    layer: MoELayer, statistics: LayerStatistics, bits: Tensor, quantiser: Quantiser
) -> Decision:
    """Return the decision that stores channel j of expert e in bits[e, j], 0 for not at all.

    Args:
        layer: of the model.
        statistics: what the quantiser requires.
        bits: int64 (E, I).
        quantiser: encodes gate and up row by row, and down column by column in falling bits.
    """
    classes = sorted(set(bits.flatten().tolist()) - {0}, reverse=True)
    counts: dict[int, list[int]] = {b: (bits == b).sum(dim=1).tolist() for b in classes}
    order = bits.argsort(dim=1, descending=True, stable=True)
    kept = [order[e, : int(width)] for e, width in enumerate((bits > 0).sum(dim=1))]
    biases, moments = middle_biases(layer), quantiser.moments(layer, statistics)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for e, (channels, experts) in enumerate(
        zip(kept, zip(*layer.stack(), strict=True), strict=True)
    ):
        own = channels.to(experts[0].device)
        gate, up, down = (w.detach() for w in experts)
        expert = ExpertWeights(gate[own], up[own], down[:, own])
        own_widths = {b: counts[b][e] for b in classes}
        seen, answered = (_moment(moments, name, e) for name in ("gate", "down"))
        answered = None if answered is None else answered[own][:, own]
        for name, tensor in _encoded(expert, own_widths, (seen, answered), quantiser):
            parts[name].append(tensor)
        for name, bias in biases.items():
            parts[name].append(bias[e, own])
    solved = {name: torch.cat(tensors) for name, tensors in parts.items()}
    widths = tuple(width for b in classes for width in counts[b])
    integers: Mapping[str, Any] = {
        "bits": tuple(classes),
        "widths": widths,
        "group": quantiser.group,
    }
    options = {"biases": "gate+up"} if biases else {}
    options |= {} if quantiser.run == "stored" else {"run": quantiser.run}
    spec = BankSpec("packed_channels", len(bits), (), integers, options)
    remarks = (_sizes(spec, layer), *quantiser.remarks(layer, statistics))
    notes = tuple(f"layer {layer.index}: {remark}" for remark in remarks)
    return Decision(untouched(layer, spec), solved, notes)


def _moment(moments: Mapping[str, MomentsOf], name: str, expert: int) -> Tensor | None:
    return moments[name](torch.tensor([expert]))[0] if name in moments else None


def _encoded(
    expert: ExpertWeights,
    widths: Mapping[int, int],
    moments: tuple[Tensor | None, Tensor | None],
    quantiser: Quantiser,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one expert, gate and up (w, H), down (H, w), by their stored names.

    Its channels lie in the order of the classes; moments are those of x and of the middle.
    """
    inputs, middle = moments
    columns, start = quantiser.encode_columns(expert.down, middle, widths), 0
    # row j of gate and of up have one width and the same inputs: coded as neighbours in one matrix
    both = torch.stack([expert.gate, expert.up], dim=1).flatten(0, 1)
    rows = quantiser.encode_rows(both, inputs, {bits: 2 * n for bits, n in widths.items()})
    for bits, width in widths.items():
        own = slice(start, start + width)
        start += width
        if bits == DENSE:
            dense = (expert.gate[own], expert.up[own], expert.down.mT[own])
            yield from zip((f"{name}.b16.dense" for name in expert._fields), dense, strict=True)
            continue
        if not width:
            continue
        gate, up = (Coded(*(part[first::2] for part in rows[bits])) for first in (0, 1))
        for name, coded in zip(expert._fields, (gate, up, columns[bits]), strict=True):
            yield f"{name}.b{bits}.codes", pack(coded.codes, bits)
            yield f"{name}.b{bits}.scale", coded.scale
            if bits > 1:
                yield f"{name}.b{bits}.zero", coded.zero


def _sizes(spec: BankSpec, layer: MoELayer) -> str:
    """Return what became of the channels, in words."""
    counted = PackedChannels.predicted_bits(spec, layer.index, layer.dims, 16)
    names = [n for n in PackedChannels.shapes(spec, layer.dims) if not n.endswith("_bias")]
    numbers = 3 * layer.num_experts * layer.hidden_size * layer.intermediate_size
    average = sum(counted[layer.index, name] for name in names) / numbers
    classes = (f"{sum(widths)} of {bits}" for bits, widths in channel_classes(spec).items())
    return (
        f"channels of bits: {', '.join(classes)}; {average:.6g} bits a number with scales and zeros"
    )
