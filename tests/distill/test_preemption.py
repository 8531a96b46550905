"""A fit that is told by SIGUSR2 that its job will be taken away."""

import os
import signal
from dataclasses import replace

import lightning
import pytest
import torch

from families import tiny
from rerail.distill import preemption
from rerail.distill.repair import repair
from rerail.distill.settings import RouterKD
from rerail.teacher.hidden_states import CachedTeacher, final_hidden_states
from students import blocks, merged

# 18 of 24 blocks train: 12 batches, 6 steps of two, rounds of 2 steps
SETTINGS = RouterKD(
    learning_rate=3e-3, batch_size=4, accumulate=2, epochs=3, evaluations=3, validation=0.25
)


class Preempted(BaseException):
    """What submitit's handler does: it requeues the job and leaves."""


class Requeue:
    """Stands for submitit's handler."""

    def __init__(self, leaves=True):
        self.leaves, self.signals = leaves, []

    def __call__(self, signum, frame):
        self.signals.append(signum)
        if self.leaves:
            raise Preempted


class Signal(lightning.Callback):
    """Sends SIGUSR2 to its own process, once a forward (`batch`) or validation begins."""

    def __init__(self, step, batch=0, validating=False):
        self.step, self.batch, self.validating = step, batch, validating
        self.ended_at = None

    def _send(self, trainer):
        os.kill(os.getpid(), signal.SIGUSR2)
        self.step = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and batch_idx % 2 == self.batch and not self.validating:
            self._send(trainer)

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == self.step and self.validating:
            self._send(trainer)

    def on_exception(self, trainer, pl_module, exception):
        self.ended_at = trainer.global_step


@pytest.fixture
def requeue():
    handler = Requeue()
    before = signal.signal(signal.SIGUSR2, handler)
    yield handler
    assert signal.getsignal(signal.SIGUSR2) is handler
    signal.signal(signal.SIGUSR2, before)


@pytest.fixture(scope="module")
def fit():
    teacher, text = tiny("qwen3_moe"), blocks()
    cached = CachedTeacher(final_hidden_states(teacher, list(text.batches(6))))

    def run(folder=None, *callbacks, settings=SETTINGS):
        trainer = {"accelerator": "cpu", "enable_progress_bar": False, "callbacks": [*callbacks]}
        return repair(merged(teacher), cached, text, settings, trainer, 0, folder)

    return run


def same(done, whole) -> bool:
    assert done.curve == whole.curve
    assert (done.kl_first, done.kl_best, done.kl_last) == (
        whole.kl_first,
        whole.kl_best,
        whole.kl_last,
    )
    assert (done.best_step, done.steps) == (whole.best_step, whole.steps)
    return all(torch.equal(done.after[n], whole.after[n]) for n in whole.after)


# the signal comes during step `step + 1`, in its first or second forward
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("step", range(6))
def test_an_interrupted_fit_ends_like_one_that_was_not(fit, requeue, tmp_path, step, batch):
    whole = fit()
    sender = Signal(step, batch)
    with pytest.raises(Preempted):
        fit(tmp_path, sender)
    assert sender.ended_at == step + 1
    assert requeue.signals == [signal.SIGUSR2]
    [held] = tmp_path.glob("*.ckpt")
    assert torch.load(held, weights_only=True)["global_step"] == step + 1
    assert same(fit(tmp_path), whole)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_signal_during_a_validation_waits_for_its_end(fit, requeue, tmp_path, step):
    whole = fit()
    with pytest.raises(Preempted):
        fit(tmp_path, Signal(step, validating=True))
    [held] = tmp_path.glob("*.ckpt")
    assert torch.load(held, weights_only=True)["curve"][-1]["step"] == step
    assert same(fit(tmp_path), whole)


def test_a_fit_may_be_interrupted_at_every_step(fit, requeue, tmp_path):
    whole = fit()
    for step in range(6):
        with pytest.raises(Preempted):
            fit(tmp_path, Signal(step))
    assert same(fit(tmp_path), whole)
    assert len(requeue.signals) == 6


@pytest.mark.parametrize(
    "changes", [{"schedule": "cosine", "warmup": 2}, {"accumulate": 1, "clip": 1e-3}]
)
def test_schedule_and_clipping_go_on_where_they_were(fit, requeue, tmp_path, changes):
    settings = replace(SETTINGS, **changes)
    whole = fit(settings=settings)
    with pytest.raises(Preempted):
        fit(tmp_path, Signal(2), settings=settings)
    assert same(fit(tmp_path, settings=settings), whole)


def test_a_handler_that_lets_the_fit_go_on_changes_nothing(fit, requeue, tmp_path):
    requeue.leaves = False
    whole = fit()
    assert same(fit(tmp_path, Signal(2), Signal(3)), whole)
    assert len(requeue.signals) == 2


def test_a_checkpoint_that_cannot_be_written_keeps_no_job_from_its_requeue(
    fit, requeue, tmp_path, monkeypatch, caplog
):
    def full(path):
        raise OSError("no space left")

    monkeypatch.setattr(preemption, "sealed_file", full)
    with pytest.raises(Preempted):
        fit(tmp_path, Signal(0))
    assert "was not written" in caplog.text


def test_what_fails_otherwise_puts_the_handler_back_too(fit, requeue, tmp_path):
    class Broken(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert signal.getsignal(signal.SIGUSR2) is not requeue
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Broken())
    assert requeue.signals == []


def test_a_signal_that_came_before_a_failure_still_reaches_the_handler(fit, requeue, tmp_path):
    class Broken(Signal):
        def _send(self, trainer):
            super()._send(trainer)
            raise ZeroDivisionError

    with pytest.raises(Preempted):
        fit(tmp_path, Broken(2))


def test_a_forked_worker_ignores_the_signal(requeue, tmp_path):
    keeper = preemption.Checkpoints(tmp_path / "fit.ckpt")
    trainer = type("Trainer", (), {"global_step": 0})()
    keeper.on_train_start(trainer, None)
    if (child := os.fork()) == 0:
        os.kill(os.getpid(), signal.SIGUSR2)
        os._exit(int(keeper.requested))
    assert os.waitpid(child, 0)[1] == 0
    os.kill(os.getpid(), signal.SIGUSR2)
    assert keeper.requested
    with pytest.raises(Preempted):
        keeper.close()


def test_where_nobody_else_listens_the_signal_ends_the_process(tmp_path):
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        keeper = preemption.Checkpoints(tmp_path / "fit.ckpt")
        keeper.on_train_start(type("Trainer", (), {"global_step": 0})(), None)
        os.kill(os.getpid(), signal.SIGUSR2)
        keeper.close()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGUSR2
