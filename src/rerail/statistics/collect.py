"""Collecting: one forward of the text for all routed and dense statistics that are wanted.

Backward and ablation statistics have passes of their own.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from rerail.errors import InputError
from rerail.moe.model import MoEModel
from rerail.parallel import my_share, reduce_in_rank_order
from rerail.statistics.ablation_pass import ablation_pass
from rerail.statistics.backward_pass import backward_pass
from rerail.statistics.forward_pass import forward_pass
from rerail.statistics.places import empty_statistics
from rerail.statistics.statistic import Statistic, StatisticSet
from rerail.transfer import moved

Batch = tuple[Tensor, Tensor]
Progress = Callable[[Sequence[Batch]], Iterable[Batch]]


@torch.no_grad()
def collect(
    model: MoEModel,
    batches: Sequence[Batch],
    statistics: Iterable[Statistic],
    progress: Progress = lambda batches: batches,
    *,
    layers: Collection[int] | None = None,
    first: int = 0,
) -> StatisticSet:
    """Run the text through the model once and return the filled statistics.

    In a group of processes all must call it, and each runs its part of the batches; what comes back
    is merged, and the same for all.

    Args:
        model: teacher, student, or a compressed prefix.
        batches: (input_ids (B, S), mask (B, S)) pairs; masked positions count for nothing.
        statistics: what to measure; duplicates are measured once.
        progress: wraps the batches, to show a bar.
        layers: indices of the layers to measure; None for all. A forward ends after the last.
        first: position in the text of the first token, where the batches are a shard of it.

    Raises:
        InputError: a statistic came out infinite or NaN, or cannot be measured on this model.
    """
    begin, own = my_share(batches)
    first += sum(ids.numel() for ids, _ in batches[:begin])
    wanted = tuple(dict.fromkeys(statistics))
    chosen = [la for la in model.layers if layers is None or la.index in layers]
    filled = empty_statistics(chosen, wanted)
    passes = {s.pass_name for s in wanted}
    if chosen and passes & {"routed", "dense"}:
        forward_pass(model, chosen, progress(own), filled, first)
    if "backward" in passes:
        backward_pass(model, chosen, progress(own), filled)
    if "ablation" in passes:
        ablation_pass(model, chosen, progress(own), filled)
    for index, tensors in filled.items():
        for statistic, tensor in tensors.items():
            # one at a time, so that a GPU's tensor is let go before the next is copied
            tensors[statistic] = reduce_in_rank_order(moved(tensor, "cpu"), statistic.merge)
            _check(statistic, tensors[statistic], index)
    return StatisticSet({i: {s.name: t for s, t in h.items()} for i, h in filled.items()})


def _check(statistic: Statistic, tensor: Tensor, index: int) -> None:
    if not statistic.is_finite(tensor):
        raise InputError(
            f"statistic {statistic.name} of layer {index} is not finite: the model's weights or "
            "activations hold NaN or infinity; load a sound checkpoint or a wider dtype"
        )
