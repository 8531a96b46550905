"""Where statistics add up: beside their layer while its GPU has room, else in the CPU's memory.

A sum that lies on the CPU costs a copy and a wait for every share that is added to it, and second
moments are large: 128 experts of width 2048 take 4.3 GB a layer.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rerail.moe.model import MoELayer
from rerail.statistics.statistic import Statistic
from rerail.transfer import free_bytes

_SHARE = 0.5  # of a GPU's free memory; the rest is for activations


def empty_statistics(
    layers: Sequence[MoELayer], statistics: Iterable[Statistic]
) -> dict[int, dict[Statistic, Tensor]]:
    """Return the tensors of zero tokens by layer index, in the order of the statistics.

    The smallest are placed first, so that only large ones are left to the CPU. What a backward or
    ablation pass fills comes seldom and lies on the CPU.
    """
    wanted = tuple(statistics)
    with torch.device("meta"):
        sizes = {(la.index, s): s.empty(la).nbytes for la in layers for s in wanted}
    devices = {layer.index: layer.router_rows.device for layer in layers}
    room = {d: _SHARE * free_bytes(d) for d in set(devices.values())}
    beside = set()
    for index, statistic in sorted(sizes, key=lambda key: sizes[key]):
        place = devices[index]
        forward = statistic.pass_name in ("routed", "dense")
        if forward and sizes[index, statistic] <= room[place]:
            room[place] -= sizes[index, statistic]
            beside.add((index, statistic))
    empty: dict[int, dict[Statistic, Tensor]] = {layer.index: {} for layer in layers}
    for layer in layers:
        for s in wanted:
            place = devices[layer.index] if (layer.index, s) in beside else torch.device("cpu")
            with place:
                empty[layer.index][s] = s.empty(layer)
    return empty
