import pytest
import torch

from rerail.distill.schedule import Schedule
from rerail.distill.settings import RouterKD
from rerail.errors import InputError


def test_3000_samples_by_2_and_4_are_375_steps():
    paper = RouterKD(batch_size=2, accumulate=4, epochs=1, validation=72 / 3072)
    schedule = Schedule.of(3072, paper)
    assert (schedule.train_blocks, schedule.batches, schedule.steps) == (3000, 1500, 375)


@pytest.mark.parametrize(
    ("blocks", "batch_size", "accumulate", "epochs", "evaluations", "expected"),
    [
        # blocks that train are 7/8 of all; (train, batches, steps, steps a round, rounds)
        (16, 2, 4, 1, 8, (14, 7, 2, 1, 2)),
        (16, 2, 1, 3, 8, (14, 21, 21, 3, 7)),
        (16, 4, 1, 1, 1, (14, 3, 3, 3, 1)),
        (256, 8, 1, 3, 8, (224, 84, 84, 11, 8)),
        (2, 1, 4, 1, 8, (1, 1, 1, 1, 1)),
    ],
)
def test_steps_and_rounds(blocks, batch_size, accumulate, epochs, evaluations, expected):
    settings = RouterKD(
        batch_size=batch_size, accumulate=accumulate, epochs=epochs, evaluations=evaluations
    )
    s = Schedule.of(blocks, settings)
    assert (s.train_blocks, s.batches, s.steps, s.round_steps, s.rounds) == expected


def test_rounds_hand_out_every_block_of_every_pass_once():
    settings = RouterKD(batch_size=3, accumulate=2, epochs=2, evaluations=4)
    schedule = Schedule.of(24, settings)
    rounds = [schedule.round_of(step) for step in range(0, schedule.steps, schedule.round_steps)]
    assert len(rounds) == schedule.rounds
    steps = [step for begin, end in rounds for step in range(begin, end)]
    assert steps == list(range(schedule.steps))
    flat = [block for step in steps for block in schedule.blocks_of(step, 5).tolist()]
    assert [sorted(flat[:21]), sorted(flat[21:])] == [list(range(21))] * 2
    assert flat[:21] != flat[21:]
    assert flat == schedule.order(5).tolist()


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "ranks", "forwards", "size"),
    [(2, 4, 1, 4, 2), (2, 4, 8, 1, 1), (2, 4, 3, 2, 2), (8, 1, 2, 1, 4), (3, 2, 4, 1, 2)],
)
def test_processes_share_a_step_in_equal_forwards(batch_size, accumulate, ranks, forwards, size):
    settings = RouterKD(batch_size=batch_size, accumulate=accumulate)
    schedule = Schedule.of(64, settings, ranks)
    assert (schedule.forwards, schedule.forward_size) == (forwards, size)
    assert schedule.forwards_of(0) == forwards
    assert 1 <= schedule.forwards_of(schedule.steps - 1) <= forwards


def test_more_processes_than_blocks_in_a_step_are_refused():
    with pytest.raises(InputError, match="start at most 8"):
        Schedule.of(64, RouterKD(batch_size=2, accumulate=4), 9)


def test_the_order_follows_the_seed():
    schedule = Schedule.of(64, RouterKD())
    assert torch.equal(schedule.order(1), schedule.order(1))
    assert not torch.equal(schedule.order(1), schedule.order(2))


@pytest.mark.parametrize(("blocks", "left"), [(1, 0), (2, 1), (4, 3)])
def test_too_few_blocks_are_refused(blocks, left):
    with pytest.raises(InputError, match=f"{blocks} calibration blocks leave {left} to train on"):
        Schedule.of(blocks, RouterKD(batch_size=4))
