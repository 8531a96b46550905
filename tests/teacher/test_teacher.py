import logging

import pytest
import torch

from families import tiny, tokens
from rerail.teacher.teacher import CachedTeacher, LiveTeacher, cached_states, speak
from students import blocks


def test_what_the_teacher_said_is_what_it_says_block_by_block():
    model, text = tiny("qwen3_moe"), blocks(7, 9)
    cached = CachedTeacher(speak(model, list(text.batches(3))))
    index = torch.tensor([6, 1, 4])
    live = LiveTeacher(model).hidden(index, text.input_ids[index], text.mask[index])
    held = cached.hidden(index, text.input_ids[index], text.mask[index])
    real = text.mask[index]
    torch.testing.assert_close(held[real], live[real])
    assert float((held[real] - held[real].roll(1, 0)).abs().max()) > 0.1


def test_states_are_kept_in_the_models_dtype():
    model = tiny("mixtral")
    model.model.bfloat16()
    assert (
        speak(model, [(tokens(2, 5), torch.ones(2, 5, dtype=torch.bool))]).dtype == torch.bfloat16
    )


def test_a_live_teacher_builds_no_graph_and_is_no_submodule():
    model = tiny("olmoe")
    for parameter in model.model.parameters():
        parameter.requires_grad_()
    teacher = LiveTeacher(model)
    out = teacher.hidden(torch.arange(2), tokens(2, 5), torch.ones(2, 5, dtype=torch.bool))
    assert not out.requires_grad
    assert not isinstance(teacher, torch.nn.Module)


def test_a_progress_bar_sees_every_batch():
    seen = []

    def watch(batches):
        for batch in batches:
            seen.append(len(batch[0]))
            yield batch

    speak(tiny("mixtral"), list(blocks(5, 6).batches(2)), watch)
    assert seen == [2, 2, 1]


def test_states_are_made_once_and_read_back_equal(tmp_path):
    states = torch.randn(2, 3, 4).bfloat16()
    made = cached_states(tmp_path / "a" / "t.safetensors", lambda: states)
    held = cached_states(tmp_path / "a" / "t.safetensors", lambda: pytest.fail("made again"))
    assert torch.equal(made, states)
    assert torch.equal(held, states)
    assert held.dtype == torch.bfloat16


@pytest.mark.parametrize("damage", ["cut", "flip", "lost", "seal"])
def test_damaged_states_are_made_again_and_that_is_said(tmp_path, caplog, damage):
    path = tmp_path / "t.safetensors"
    cached_states(path, lambda: torch.zeros(2, 3, 4))
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-8])
    elif damage == "flip":
        path.write_bytes(data[:-1] + b"\x01")
    elif damage == "lost":
        path.unlink()
    else:
        path.with_suffix(".json").write_text("{")
    with caplog.at_level(logging.WARNING):
        again = cached_states(path, lambda: torch.ones(2, 3, 4))
    assert torch.equal(again, torch.ones(2, 3, 4))
    assert ("damaged" in caplog.text) == (damage != "lost")
    assert torch.equal(cached_states(path, lambda: pytest.fail("made again")), again)
