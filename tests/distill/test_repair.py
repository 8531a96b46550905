import dataclasses
import logging
import math

import lightning
import pytest
import torch

from families import CONFIGS, tiny
from rerail.distill.repair import repair
from rerail.distill.settings import RouterKD
from rerail.errors import InputError
from rerail.files import digest
from rerail.plan.apply import apply_plan
from rerail.plan.plan import Plan
from rerail.teacher.hidden_states import CachedTeacher, LiveTeacher, final_hidden_states
from students import blocks, masked, merged, sliced

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
SETTINGS = RouterKD(
    learning_rate=3e-3, batch_size=4, accumulate=2, epochs=3, evaluations=5, validation=0.25
)  # 18 of 24 blocks train: 12 batches, 6 steps, rounds of 2


def fit(student, teacher, text=None, settings=SETTINGS, seed=0, folder=None, **trainer):
    text = blocks() if text is None else text
    return repair(student, teacher, text, settings, {**QUIET, **trainer}, seed, folder)


def hashes(model) -> dict[str, str]:
    named = [*model.model.named_parameters(), *model.model.named_buffers()]
    return {n: digest(t.double().tolist()) for n, t in named}


def names_of_rows(model) -> set[str]:
    rows = {id(layer.router_rows) for layer in model.layers}
    return {n for n, p in model.model.named_parameters() if id(p) in rows}


def misrouted(teacher):
    """Return a student that lacks nothing but good router rows, so that a repair helps."""
    student = apply_plan(teacher, Plan())
    generator = torch.Generator().manual_seed(1)
    for layer in student.layers:
        noise = torch.randn(layer.router_rows.shape, generator=generator)
        owner, name = layer.rows_owner()
        setattr(owner, name, torch.nn.Parameter(layer.router_rows + 0.1 * noise))
    return student


@pytest.mark.parametrize(
    ("family", "make"),
    [*((family, misrouted) for family in CONFIGS), ("qwen3_moe", masked), ("qwen3_moe", merged)],
)
def test_only_router_rows_change_and_the_teacher_keeps_all(family, make):
    teacher = tiny(family)
    student = make(teacher)
    theirs, mine = hashes(teacher), hashes(student)
    settings = RouterKD(learning_rate=2e-3, batch_size=4, accumulate=1, evaluations=4)
    done = fit(student, LiveTeacher(teacher), blocks(64, 8), settings)
    after = hashes(student)
    assert done.best_step > 0
    assert {n for n in after if after[n] != mine[n]} == names_of_rows(student)
    assert len(names_of_rows(student)) == len(student.layers)
    assert hashes(teacher) == theirs
    assert not any(p.requires_grad for p in student.model.parameters())


def test_what_is_shared_stays_shared_after_the_fit_and_after_a_cast():
    teacher = tiny("qwen3_moe")
    student = sliced(teacher)

    def shared() -> int:
        held = {id(p) for p in teacher.model.parameters()}
        return sum(id(p) in held for p in student.model.parameters())

    before = shared()
    settings = RouterKD(learning_rate=3e-3, batch_size=4, accumulate=1, epochs=2, evaluations=6)
    done = fit(student, LiveTeacher(teacher), blocks(128, 12), settings)
    assert done.best_step > 0
    assert shared() == before == len(list(student.model.parameters())) - 2
    student.model.to(torch.float64)
    assert shared() == before
    assert teacher.model.get_input_embeddings().weight.dtype == torch.float64
    assert teacher.layers[0].router_rows.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [1e4, 1e30])
def test_a_fit_that_only_harms_leaves_the_rows_of_step_0_bit_for_bit(dtype, rate):
    teacher = tiny("qwen3_moe")
    teacher.model.to(dtype)
    student = sliced(teacher)
    before = [layer.router_rows.clone() for layer in student.layers]
    settings = RouterKD(learning_rate=rate, batch_size=4, accumulate=1, evaluations=3)
    done = fit(student, LiveTeacher(teacher), blocks(16, 8), settings)
    assert done.best_step == 0
    assert done.kl_first == done.kl_best
    assert math.isnan(done.kl_last) or done.kl_last > done.kl_first
    assert done.steps > 0
    for layer, rows in zip(student.layers, before, strict=True):
        assert layer.router_rows.dtype == dtype
        assert torch.equal(layer.router_rows, rows)
    assert all(torch.equal(done.before[n], done.after[n]) for n in done.before)


def test_the_best_step_is_kept_even_when_the_last_is_worse():
    teacher = tiny("qwen3_moe")
    student, text = merged(teacher), blocks(48, 12)
    settings = RouterKD(learning_rate=2e-2, batch_size=4, accumulate=1, epochs=6, evaluations=20)
    done = fit(student, LiveTeacher(teacher), text, settings)
    values = [point["val_kl"] for point in done.curve]
    steps = [point["step"] for point in done.curve]
    assert done.kl_best == min(values) < min(values[0], values[-1])
    assert (done.kl_first, done.kl_last) == (values[0], values[-1])
    assert done.best_step == steps[values.index(min(values))]
    assert steps == [0, *range(3, 60, 3), 60]
    assert done.steps == 60
    again = repair_of_nothing(student, teacher, text)
    assert again == pytest.approx(done.kl_best, rel=1e-5)
    for layer, rows in zip(student.layers, done.after.values(), strict=True):
        assert torch.equal(layer.router_rows, rows)


def repair_of_nothing(student, teacher, text) -> float:
    """Return the validation KL of a student as it is."""
    settings = RouterKD(learning_rate=1e-9, batch_size=4, accumulate=1, evaluations=1)
    return fit(student, LiveTeacher(teacher), text, settings).kl_first


def test_steps_are_counted_as_the_optimiser_makes_them():
    teacher = tiny("qwen3_moe")
    settings = RouterKD(batch_size=2, accumulate=4, epochs=1, evaluations=2, validation=0.125)
    done = fit(sliced(teacher), LiveTeacher(teacher), blocks(32, 4), settings)
    assert [point["step"] for point in done.curve] == [0, 2, 4]  # 28 blocks, 14 batches
    assert done.steps == 4


def test_a_cached_teacher_teaches_what_the_live_one_does():
    teacher, text = tiny("qwen3_moe"), blocks()
    cached = CachedTeacher(final_hidden_states(teacher, list(text.batches(6))))
    fits = [fit(merged(teacher), source) for source in (cached, LiveTeacher(teacher))]
    for a, b in zip(*(done.curve for done in fits), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for name, rows in fits[0].after.items():
        torch.testing.assert_close(rows, fits[1].after[name], rtol=0, atol=2e-5)
        assert float((rows - fits[0].before[name]).abs().mean()) > 2e-3


def test_the_seed_decides_the_fit():
    teacher, rows = tiny("qwen3_moe"), []
    for seed in (0, 0, 1):
        done = fit(merged(teacher), LiveTeacher(teacher), seed=seed)
        rows.append([point["val_kl"] for point in done.curve])
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


class Heard(LiveTeacher):
    """A teacher that notes which blocks it is asked for."""

    def __init__(self, model):
        super().__init__(model)
        self.blocks = []

    def hidden(self, index, input_ids, mask):
        self.blocks += index.tolist()
        return super().hidden(index, input_ids, mask)


def test_every_pass_sees_every_training_block_once_and_validation_sees_the_others():
    model = tiny("qwen3_moe")
    teacher = Heard(model)
    fit(sliced(model), teacher, blocks(16, 8), dataclasses.replace(SETTINGS, batch_size=2))
    held = [12, 13, 14, 15]
    trained = [block for block in teacher.blocks if block not in held]
    passes = [trained[i : i + 12] for i in (0, 12, 24)]
    assert [sorted(part) for part in passes] == [list(range(12))] * 3
    assert len({tuple(part) for part in passes}) == 3
    assert [block for block in teacher.blocks if block in held] == held * 6


class Norms(lightning.Callback):
    """Notes the gradient norms of the steps that were made."""

    def __init__(self):
        self.seen = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        grads = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.seen += [float(torch.cat(grads).norm())] if grads else []


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_gradients_are_clipped_when_asked_for(clip):
    teacher, norms = tiny("qwen3_moe"), Norms()
    settings = dataclasses.replace(SETTINGS, clip=clip, accumulate=1)
    fit(sliced(teacher), LiveTeacher(teacher), settings=settings, callbacks=[norms])
    assert len(norms.seen) > 5
    assert all(norm > 2e-3 if clip == 0 else norm < 1.001e-3 for norm in norms.seen)


class Killed(RuntimeError):
    pass


class Mortal(LiveTeacher):
    """A teacher that dies after so many calls."""

    def __init__(self, model, last=10_000):
        super().__init__(model)
        self.last, self.calls = last, 0

    def hidden(self, index, input_ids, mask):
        if self.calls == self.last:
            raise Killed
        self.calls += 1
        return super().hidden(index, input_ids, mask)


# step 0 is 2 calls, then each of 3 rounds is 4 to train and 2 to validate: 20 in all
@pytest.mark.parametrize(
    ("calls", "saved"), [(1, 0), (5, 0), (8, 8), (9, 8), (13, 8), (14, 14), (19, 14)]
)
def test_a_killed_fit_goes_on_to_the_same_end(tmp_path, calls, saved):
    teacher = tiny("qwen3_moe")
    whole = fit(merged(teacher), LiveTeacher(teacher))
    student = merged(teacher)
    before = [layer.router_rows for layer in student.layers]
    with pytest.raises(Killed):
        fit(student, Mortal(teacher, calls), folder=tmp_path)
    assert all(layer.router_rows is b for layer, b in zip(student.layers, before, strict=True))
    left = [path.suffix for path in sorted(tmp_path.iterdir())]
    assert left == ([".ckpt", ".seal"] if saved else [])
    second = Mortal(teacher)
    done = fit(student, second, folder=tmp_path)
    assert second.calls == 20 - saved
    assert done.curve == whole.curve
    assert (done.kl_best, done.best_step) == (whole.kl_best, whole.best_step)
    assert done.steps == whole.steps == 6
    assert all(torch.equal(done.after[n], whole.after[n]) for n in whole.after)
    assert list(tmp_path.iterdir()) == []


def test_a_fit_goes_on_with_the_best_step_that_it_had_before_it_was_killed(tmp_path):
    teacher, harmful = tiny("qwen3_moe"), dataclasses.replace(SETTINGS, learning_rate=1e4)
    whole = fit(merged(teacher), LiveTeacher(teacher), settings=harmful)
    with pytest.raises(Killed):
        fit(merged(teacher), Mortal(teacher, 9), settings=harmful, folder=tmp_path)
    done = fit(merged(teacher), LiveTeacher(teacher), settings=harmful, folder=tmp_path)
    assert (done.best_step, done.kl_best) == (0, whole.kl_best)
    assert done.curve == whole.curve
    assert all(torch.equal(done.after[n], done.before[n]) for n in done.before)


def test_a_fit_that_left_the_numbers_stops_and_says_so():
    teacher, wild = tiny("qwen3_moe"), dataclasses.replace(SETTINGS, learning_rate=3e37)
    student = sliced(teacher)
    before = student.layers[0].router_rows.clone()
    done = fit(student, LiveTeacher(teacher), settings=wild)
    assert math.isnan(done.kl_last)
    assert (done.steps, done.best_step) == (2, 0)
    assert torch.equal(student.layers[0].router_rows, before)


def killed_in(folder, teacher, **changes):
    with pytest.raises(Killed):
        fit(merged(teacher), Mortal(teacher, 15), folder=folder, **changes)
    (path,) = folder.glob("*.ckpt")
    return path


def test_a_checkpoint_holds_masters_only_and_plain_data(tmp_path):
    path = killed_in(tmp_path, tiny("qwen3_moe"))
    held = torch.load(path, weights_only=True)
    assert set(held["state_dict"]) == {f"masters.layers_{i}_router_weight" for i in (0, 1)}
    assert [point["step"] for point in held["curve"]] == [0, 2, 4]
    assert held["best"][0] == min(point["val_kl"] for point in held["curve"])
    assert path.stat().st_size < 40_000


def flipped(path):
    """Flip the lowest bit of the middle of an optimiser's or a master's numbers."""
    held = torch.load(path, weights_only=True)
    numbers = next(iter(held["state_dict"].values())).numpy().tobytes()[:16]
    data = bytearray(path.read_bytes())
    data[data.index(numbers)] ^= 1
    path.write_bytes(bytes(data))
    assert len(torch.load(path, weights_only=True)) == len(held)  # it can still be read


def cut(path):
    path.write_bytes(path.read_bytes()[:500])


def unsealed(path):
    path.with_name(f"{path.name}.seal").unlink()


@pytest.mark.parametrize("damage", [flipped, cut, unsealed])
def test_from_a_damaged_checkpoint_a_repair_starts_anew_and_warns(tmp_path, caplog, damage):
    teacher = tiny("qwen3_moe")
    path = killed_in(tmp_path, teacher)
    damage(path)
    with caplog.at_level(logging.WARNING):
        done = fit(merged(teacher), LiveTeacher(teacher), folder=tmp_path)
    assert f"{path} is damaged" in caplog.text
    whole = fit(merged(teacher), LiveTeacher(teacher))
    assert done.curve == whole.curve
    assert all(torch.equal(done.after[n], whole.after[n]) for n in whole.after)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"settings": RouterKD(batch_size=4)}, {"text": blocks(24, seed=1)}],
)
def test_a_checkpoint_of_another_fit_is_not_used(tmp_path, changes):
    teacher = tiny("qwen3_moe")
    killed_in(tmp_path, teacher)
    done = fit(merged(teacher), LiveTeacher(teacher), folder=tmp_path, **changes)
    assert done.curve == fit(merged(teacher), LiveTeacher(teacher), **changes).curve


@pytest.mark.parametrize("argument", ["max_epochs", "accumulate_grad_batches"])
def test_what_the_settings_decide_is_refused_as_an_argument_of_the_trainer(argument):
    teacher = tiny("qwen3_moe")
    with pytest.raises(InputError, match=f"trainer.{argument} is decided by the settings"):
        fit(sliced(teacher), LiveTeacher(teacher), **{argument: 3})


def test_a_precision_that_casts_the_masters_is_refused():
    teacher = tiny("qwen3_moe")
    with pytest.raises(InputError, match="'bf16-true' casts the router's float32 masters"):
        fit(sliced(teacher), LiveTeacher(teacher), precision="bf16-true")


def test_a_teacher_that_is_not_finite_is_refused_before_the_first_step():
    teacher, text = tiny("qwen3_moe"), blocks()
    states = torch.full((24, 12, 16), torch.nan)
    student = sliced(teacher)
    before = student.layers[0].router_rows
    with pytest.raises(InputError, match="is nan before the first step"):
        fit(student, CachedTeacher(states), text)
    assert student.layers[0].router_rows is before


def test_callbacks_of_the_caller_run_beside_ours():
    class Count(lightning.Callback):
        rounds = 0

        def on_train_epoch_end(self, trainer, pl_module):
            self.rounds += 1

    teacher, count = tiny("qwen3_moe"), Count()
    fit(sliced(teacher), LiveTeacher(teacher), callbacks=[count])
    assert count.rounds == 3


def test_training_mode_is_never_on_while_it_learns():
    teacher = tiny("qwen3_moe")
    student, modes = sliced(teacher), set()
    student.model.train()
    student.layers[0].router.register_forward_pre_hook(lambda m, _: modes.add(m.training))
    fit(student, LiveTeacher(teacher))
    assert modes == {False}
