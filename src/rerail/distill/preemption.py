"""A fit that can be interrupted: checkpoints after every round, and when the cluster asks for one.

SIGUSR2 says that the job will soon be taken away; whoever submitted it has a handler that requeues
it. During a fit ours comes first: it only sets a flag. At the end of the optimiser step the
checkpoint is written, and then the other handler acts.
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
        self.asked = False
        self._previous: Any = None
        self._pid = os.getpid()
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Take the signal over."""
        self._step = trainer.global_step
        self._listen()

    def _listen(self) -> None:
        # None is a handler that Python did not install and could not put back
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGUSR2)
            if self._previous is not None:
                signal.signal(signal.SIGUSR2, self._hear)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:  # and not in a forked worker of a loader
            self.asked = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write and hand over where it is asked for and the optimiser has stepped.

        After the last step of a round its validation comes first.
        """
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if batch_idx + 1 < trainer.num_training_batches and self._agreed(trainer):
            self._save_and_hand_over(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Write; hand over where it is asked for."""
        if self._agreed(trainer):
            self._save_and_hand_over(trainer)
        else:
            self._save(trainer)

    def _agreed(self, trainer: lightning.Trainer) -> bool:
        """Return whether any process was asked: the signal reaches them at different moments."""
        return bool(trainer.strategy.reduce_boolean_decision(self.asked, all=False))

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
        self.asked = True  # also where only another process heard the signal
        self.close()
        self.asked = False
        self._listen()  # for the next signal, where the other handler lets the fit go on

    def close(self) -> None:
        """Put the other handler back, and let it act where a signal was kept from it."""
        previous, self._previous = self._previous, None
        if previous is None:
            return
        signal.signal(signal.SIGUSR2, previous)
        if not self.asked:
            return
        self.asked = False
        if callable(previous):
            previous(signal.SIGUSR2, None)
        elif previous == signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGUSR2)
