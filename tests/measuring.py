"""Every statistic, a padded text to measure them on, and what the experts of a model saw."""

import torch

from families import tokens
from rerail.compress.guard import MaxOutput
from rerail.methods.easy_ep import Deviation
from rerail.methods.mone import OutputSquares
from rerail.moe.model import MoEModel
from rerail.statistics.collect import Batch
from rerail.statistics.dense import OutputSum, TokenCount
from rerail.statistics.moments import (
    InputMoment,
    LayerMoment,
    LogitGram,
    MiddleMoment,
    PooledMiddleMoment,
)
from rerail.statistics.routed import Count, GatedOutput, Moment, OutputSumRouted
from rerail.statistics.squares import InputSquares, MiddleEnergy, MiddlePeak, MiddleSquares
from rerail.statistics.statistic import Statistic
from rerail.statistics.token_sample import TokenSample

DENSE = (OutputSum(), TokenCount())
ROUTED = (
    Count(),
    *(Moment(a, p) for a in (0, 1, 2) for p in (0, 1, 2)),
    MaxOutput(),
    OutputSumRouted(),
    OutputSquares(),
    GatedOutput(2),
    InputMoment(),
    MiddleMoment(),
    MiddleMoment(2),
    LayerMoment(),
    PooledMiddleMoment(),
    MiddleEnergy(),
    MiddlePeak(),
    InputSquares(),
    MiddleSquares(),
    LogitGram(),
    TokenSample(20),
)


def everything(family: str) -> tuple[Statistic, ...]:
    """Return all routed and dense statistics that a family gives (flex_olmo norms afterwards)."""
    return (*ROUTED, *DENSE) if family == "flex_olmo" else (*ROUTED, *DENSE, Deviation())


def batches(count: int = 6, length: int = 16, size: int = 2, padded: bool = True) -> list[Batch]:
    """Return random (input_ids, mask); with `padded`, every second sequence ends after 11."""
    ids = tokens(count, length)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[::2, 11:] = False
    return list(zip(ids.split(size), mask.split(size), strict=True))


class Seen:
    """What the experts of a model were handed and what the last norm gave, batch by batch."""

    def __init__(self, model: MoEModel):
        self.handed: dict[int, list[tuple[torch.Tensor, ...]]] = {
            la.index: [] for la in model.layers
        }
        self.outputs: list[torch.Tensor] = []
        for layer in model.layers:
            layer.experts.register_forward_pre_hook(
                lambda _, args, i=layer.index: self.handed[i].append(args)
            )
        model.model.base_model.register_forward_hook(
            lambda _, __, out: self.outputs.append(out.last_hidden_state)
        )
