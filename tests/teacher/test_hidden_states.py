import torch

from families import tiny, tokens
from rerail.teacher.hidden_states import (
    CachedTeacher,
    LiveTeacher,
    final_hidden_states,
)
from students import blocks


def test_what_the_teacher_said_is_what_it_says_block_by_block():
    model, text = tiny("qwen3_moe"), blocks(7, 9)
    cached = CachedTeacher(final_hidden_states(model, list(text.batches(3))))
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
        final_hidden_states(model, [(tokens(2, 5), torch.ones(2, 5, dtype=torch.bool))]).dtype
        == torch.bfloat16
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

    final_hidden_states(tiny("mixtral"), list(blocks(5, 6).batches(2)), watch)
    assert seen == [2, 2, 1]
