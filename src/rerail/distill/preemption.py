"""A fit that can be interrupted: checkpoints after every round, and when the cluster asks for one.

SIGUSR2 means that the cluster will soon take the job away; its submitter has a handler that
requeues it. During a fit our handler stands in its place and only sets a flag. At the end of the
optimiser step the checkpoint is written, and then the submitter's handler is called.
"""

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning

from rerail.store import sealed_file

log = logging.getLogger(__name__)


class Checkpoints(lightning.Callback):
    """Writes where the fit stands, whole and sealed: after every round, and on SIGUSR2.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path
        self.requested = False
        self._previous: Any = None
        self._pid = os.getpid()
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        self._install_handler()

    def _install_handler(self) -> None:
        # Python allows handlers in the main thread only
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGUSR2)
            # None is a handler that Python did not install, so `close` could not put it back
            if self._previous is not None:
                signal.signal(signal.SIGUSR2, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # a fork (a worker of a loader) inherits the handler and must not act on it
        if os.getpid() == self._pid:
            self.requested = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write and hand over where that is requested and the optimiser has stepped.

        After the last step of a round its validation comes first.
        """
        if trainer.global_step == self._step:  # gradients still add up: not a state to go on from
            return
        self._step = trainer.global_step
        if batch_idx + 1 < trainer.num_training_batches and self._any_requested(trainer):
            self._save_and_hand_over(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self._any_requested(trainer):
            self._save_and_hand_over(trainer)
        else:
            self._save(trainer)

    def _any_requested(self, trainer: lightning.Trainer) -> bool:
        """Return whether any process got the signal: it reaches them at different moments."""
        return bool(trainer.strategy.reduce_boolean_decision(self.requested, all=False))

    def _save(self, trainer: lightning.Trainer) -> None:
        if not trainer.is_global_zero:  # takes part, and writes nothing
            trainer.save_checkpoint(self.path)
            return
        with sealed_file(self.path) as temporary:
            trainer.save_checkpoint(temporary)

    def _save_and_hand_over(self, trainer: lightning.Trainer) -> None:
        try:
            self._save(trainer)
            log.info("interrupted after step %d: %s", trainer.global_step, self.path)
        except Exception:  # the job must be requeued all the same
            log.exception("%s was not written; the repair goes on from an earlier one", self.path)
        self.requested = True  # also where only another process got the signal
        self.close()
        self.requested = False
        self._install_handler()  # for the next signal, where the other handler lets the fit go on

    def close(self) -> None:
        """Put the other handler back, and call it where our handler took a signal meant for it."""
        previous, self._previous = self._previous, None
        if previous is None:
            return
        signal.signal(signal.SIGUSR2, previous)
        if not self.requested:
            return
        self.requested = False
        if callable(previous):
            previous(signal.SIGUSR2, None)
        elif previous == signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGUSR2)
