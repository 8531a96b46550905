"""The arithmetic of a fit: batches, optimiser steps, rounds, and the order of the blocks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.distill.settings import RouterKD
from rerail.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """Which blocks train at which step: the batches of all passes in one row, cut into rounds.

    A round ends with a validation and, where asked for, a checkpoint.

    Attributes:
        train_blocks: leading blocks that train; the others validate.
        batch_size, accumulate: blocks a batch, batches an optimiser step.
        batches, steps: of the whole fit.
        round_steps: optimiser steps a round; the last round may be shorter.
        passes: over the blocks that train.
        ranks: processes that fit together: they share the blocks of every optimiser step.
    """

    train_blocks: int
    batch_size: int
    accumulate: int
    batches: int
    steps: int
    round_steps: int
    passes: int
    ranks: int = 1

    @classmethod
    def of(cls, blocks: int, settings: RouterKD, ranks: int = 1) -> "Schedule":
        """Plan a fit over so many blocks.

        Raises:
            InputError: there are too few blocks to train and to validate, or in an optimiser step
                for as many processes.
        """
        train = settings.train_blocks(blocks)
        if train < settings.batch_size:
            raise InputError(
                f"{blocks} calibration blocks leave {max(train, 0)} to train on, fewer than "
                f"distill.batch_size={settings.batch_size}; ask for more samples or a smaller batch"
            )
        step_blocks = settings.batch_size * settings.accumulate
        if ranks > step_blocks:
            raise InputError(
                f"{ranks} processes cannot share the distill.batch_size={settings.batch_size} x "
                f"distill.accumulate={settings.accumulate} blocks of an optimiser step; start at "
                f"most {step_blocks}"
            )
        batches = train // settings.batch_size * settings.epochs  # full ones: see `order`
        steps = math.ceil(batches / settings.accumulate)
        return cls(
            train_blocks=train,
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            batches=batches,
            steps=steps,
            round_steps=math.ceil(steps / settings.evaluations),
            passes=settings.epochs,
            ranks=ranks,
        )

    @property
    def rounds(self) -> int:
        """Number of validations after the first step."""
        return math.ceil(self.steps / self.round_steps)

    def order(self, seed: int) -> Tensor:
        """Return int64 (batches * batch_size,): the blocks of every batch, each pass shuffled anew.

        Full batches only, so that every step sees as much text.
        """
        # one generator for all passes: pass n has the same order however many follow
        generator = torch.Generator().manual_seed(seed)
        full = self.train_blocks - self.train_blocks % self.batch_size
        passes = [
            torch.randperm(self.train_blocks, generator=generator)[:full]
            for _ in range(self.passes)
        ]
        return torch.cat(passes)

    @property
    def forwards(self) -> int:
        """Forwards of one process in an optimiser step; `accumulate` where there is one process."""
        return math.ceil(self._share(self.batch_size * self.accumulate) / self.batch_size)

    @property
    def forward_size(self) -> int:
        """Blocks in a forward of one process, `batch_size` at most."""
        # the share cut evenly: 5 blocks in 2 forwards are 3 and 2, not 4 and 1
        return math.ceil(self._share(self.batch_size * self.accumulate) / self.forwards)

    def _share(self, blocks: int) -> int:
        return math.ceil(blocks / self.ranks)

    def round_of(self, step: int) -> tuple[int, int]:
        """Return the steps at which the round of a step begins and ends; past all, the last's."""
        # a fit that is resumed after its last step asks, too
        begin = min(step, self.steps - 1) // self.round_steps * self.round_steps
        return begin, min(begin + self.round_steps, self.steps)

    def blocks_of(self, step: int, seed: int) -> Tensor:
        """Return int64 (n,): the blocks of an optimiser step, batch by batch."""
        size = self.accumulate * self.batch_size
        return self.order(seed)[step * size : (step + 1) * size]

    def forwards_of(self, step: int) -> int:
        """Return the forwards of one process in a step; the last step may have fewer."""
        size = self.accumulate * self.batch_size
        blocks = min(size, self.batches * self.batch_size - step * size)
        return math.ceil(self._share(blocks) / self.forward_size)
