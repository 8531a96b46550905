"""The arithmetic of a fit: batches, optimiser steps, rounds, and the order of the blocks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.distill.settings import RouterKD
from rerail.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """Who trains when. The batches of all passes form one row, which is cut into rounds.

    A round ends with a validation and, where asked for, a checkpoint.

    Attributes:
        train_blocks: leading blocks that train; the others validate.
        batch_size, accumulate: blocks a batch, batches an optimiser step.
        batches, steps: of the whole fit.
        round_steps: optimiser steps a round; the last round may be shorter.
        passes: over the blocks that train.
    """

    train_blocks: int
    batch_size: int
    accumulate: int
    batches: int
    steps: int
    round_steps: int
    passes: int

    @classmethod
    def of(cls, blocks: int, settings: RouterKD) -> "Schedule":
        """Plan a fit over so many blocks.

        Raises:
            InputError: there are too few blocks to train and to validate.
        """
        train = blocks - max(1, round(blocks * settings.validation))
        if train < settings.batch_size:
            raise InputError(
                f"{blocks} calibration blocks leave {max(train, 0)} to train on, fewer than "
                f"distill.batch_size={settings.batch_size}; ask for more samples or a smaller batch"
            )
        batches = train // settings.batch_size * settings.epochs
        steps = math.ceil(batches / settings.accumulate)
        a_round = math.ceil(steps / settings.evaluations)
        sizes = (settings.batch_size, settings.accumulate)
        return cls(train, *sizes, batches, steps, a_round, settings.epochs)

    @property
    def rounds(self) -> int:
        """Number of validations after the first step."""
        return math.ceil(self.steps / self.round_steps)

    def order(self, seed: int) -> Tensor:
        """Return int64 (batches * batch_size,): the blocks of every batch, each pass shuffled anew.

        Full batches only, so that every step sees as much text.
        """
        generator = torch.Generator().manual_seed(seed)
        full = self.train_blocks - self.train_blocks % self.batch_size
        passes = [
            torch.randperm(self.train_blocks, generator=generator)[:full]
            for _ in range(self.passes)
        ]
        return torch.cat(passes)

    def blocks_after(self, step: int, seed: int) -> list[int]:
        """Return the blocks of the round that begins after so many optimiser steps."""
        a_step = self.accumulate * self.batch_size
        return self.order(seed)[step * a_step : (step + self.round_steps) * a_step].tolist()
