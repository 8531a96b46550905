"""Models whose decoder layers a device map has placed: accelerate's hooks move what flows."""

import pytest
import torch
from accelerate import dispatch_model

from families import CONFIGS, tiny
from measuring import batches, everything
from rerail.evaluate.perplexity import score_blocks
from rerail.plan.apply import apply_plan
from rerail.statistics.collect import collect
from stored_forms import solved
from students import masked, merged, sliced


def placed(family: str):
    """Return a tiny model with the hooks that a map over several devices gives it."""
    model = tiny(family)
    places = {name: "cpu" for name, _ in model.model.base_model.named_children()}
    places = {f"{model.model.base_model_prefix}.{name}": at for name, at in places.items()}
    places |= {n: "cpu" for n, _ in model.model.named_children() if n not in {"model"}}
    dispatch_model(model.model, places, main_device="cpu", force_hooks=True)
    assert hasattr(model.layers[0].experts, "_hf_hook")
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss"])
def test_statistics_are_those_of_a_model_in_one_place(family):
    assert family in CONFIGS
    here, there = (
        collect(m, batches(), everything(family)) for m in (tiny(family), placed(family))
    )
    for index, tensors in here.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, there.tensors[index][name]), name


def low_rank(teacher):
    return apply_plan(teacher, solved(teacher, "low_rank"))


@pytest.mark.parametrize("make", [sliced, masked, merged, low_rank])
def test_students_score_as_those_of_a_model_in_one_place(make):
    scores = []
    for teacher in (tiny("qwen3_moe"), placed("qwen3_moe")):
        scored = score_blocks(teacher, batches())
        scores.append(score_blocks(make(teacher), batches(), scored.hidden))
    assert float(scores[0].kl.sum()) > 0
    assert torch.equal(scores[0].nll, scores[1].nll)
    assert torch.equal(scores[0].kl, scores[1].kl)


def test_a_student_of_a_placed_model_reaches_its_own_modules():
    teacher = placed("qwen3_moe")
    student = merged(teacher)
    with torch.no_grad():
        before = teacher.hidden(*batches()[0])
        for layer in student.layers:
            for tensor in layer.experts.dense().values():
                tensor.zero_()
        assert torch.equal(teacher.hidden(*batches()[0]), before)
        assert not torch.equal(student.hidden(*batches()[0]), before)
