"""The data of a fit: rounds of micro-batches, split over the processes that fit together."""

from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rerail.distill.schedule import Schedule
from rerail.teacher.kl import target_weights
from rerail.text.calibration import TokenBlocks

Batch = dict[str, Tensor]


def make_batch(blocks: TokenBlocks, index: Tensor, weights: Tensor) -> Batch:
    """Return `input_ids`, `mask` (B, S) of the blocks at `index` (B,), with `weights` (B, S-1)."""
    ids, mask = blocks.input_ids[index], blocks.mask[index]
    return {"input_ids": ids, "mask": mask, "index": index, "weights": weights}


def share_of_rank(index: Tensor, weights: Tensor, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Return one process's share of blocks (N,) and their weights (N, S-1): every `ranks`-th.

    All shares are as long as the longest, since all processes must make the same forwards: a block
    of weight zero fills a shorter one.
    """
    mine, mine_weights = index[rank::ranks], weights[rank::ranks]
    missing = -(-len(index) // ranks) - len(mine)  # 0 or 1: the ceiling less this share
    if missing:
        mine = torch.cat([mine, index[:missing]])
        mine_weights = torch.cat([mine_weights, torch.zeros_like(weights[:missing])])
    return mine, mine_weights


class Round:
    """The rest of a round, from an optimiser step on, as one process sees it.

    Its length is that of the whole round: Lightning counts on from where a fit was interrupted.
    """

    def __init__(self, data: "Rounds", step: int):
        self.data, self.step = data, step
        self.begin, self.end = data.schedule.round_of(step)

    def _batches(self, step: int) -> list[Batch]:
        data, schedule = self.data, self.data.schedule
        index = schedule.blocks_of(step, data.seed)
        # weights first, by whole batches: they average over a batch, which processes then share
        masks = [data.blocks.mask[batch] for batch in torch.split(index, schedule.batch_size)]
        weights = torch.cat([target_weights(mask, data.average) for mask in masks])
        mine = share_of_rank(index, weights, data.rank, schedule.ranks)
        pieces = zip(*(torch.split(t, schedule.forward_size) for t in mine), strict=True)
        return [make_batch(data.blocks, i, w) for i, w in pieces]

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.step, self.end):
            yield from self._batches(step)

    def __len__(self) -> int:
        """Return the number of batches of the whole round."""
        return sum(self.data.schedule.forwards_of(step) for step in range(self.begin, self.end))

    def state_dict(self) -> dict[str, Any]:
        return {}  # `train_dataloader` starts at the trainer's optimiser step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load nothing; Lightning asks for both."""


class Rounds(lightning.LightningDataModule):
    """Leading blocks train, round by round, in an order that the seed decides; the others validate.

    Args:
        blocks: calibration text.
        schedule: which blocks train at which step.
        seed: of the order.
        average: how the targets of a batch are weighted, `sequence` or `token`.
        rank: of this process among the `schedule.ranks` that fit together.
    """

    def __init__(
        self, blocks: TokenBlocks, schedule: Schedule, seed: int, average: str, rank: int = 0
    ):
        super().__init__()
        self.blocks, self.schedule, self.seed = blocks, schedule, seed
        self.average, self.rank = average, rank

    def train_dataloader(self) -> Any:
        """Return what is left of the round at the trainer's optimiser step."""
        assert self.trainer is not None
        # Lightning asks anew every round (`reload_dataloaders_every_n_epochs`), and after a resume
        return Round(self, self.trainer.global_step)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return this process's share of the held-out blocks, each target of weight one."""
        index = torch.arange(self.schedule.train_blocks, len(self.blocks))
        weights = self.blocks.mask[index, 1:].float()
        mine = share_of_rank(index, weights, self.rank, self.schedule.ranks)
        pieces = zip(*(torch.split(t, self.schedule.batch_size) for t in mine), strict=True)
        batches: Any = [make_batch(self.blocks, i, w) for i, w in pieces]
        return DataLoader(batches, batch_size=None)  # they are batches already
