"""The sequential driver: what it measures on which model."""

import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.sequential import sequential
from rerail.methods.camera import Camera
from rerail.methods.naee import NAEE
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect
from rerail.statistics.statistic import StatisticSet
from rerail.statistics.token_sample import OriginalTokenSample, TokenSample


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = tokens(6, 12)
    return [(part, torch.ones_like(part, dtype=torch.bool)) for part in ids.split(3)]


def silent(label: str):
    return lambda items: items


def test_what_stays_the_originals_is_measured_once_and_the_rest_on_the_prefix() -> None:
    teacher, labels = tiny("qwen3_moe"), []
    statistics = (TokenSample(30), OriginalTokenSample(30))
    driver = sequential(teacher, batches(), statistics, lambda s: labels.append(s) or silent(s))
    filled = collect(teacher, batches(), Camera().requires)
    plan = make_plan(Camera(), teacher.layers, filled, Ratio(0.5), Uniform())
    first = {name: t for name, t in plan.tensors.items() if name.startswith("layers.0.")}
    prefix = Plan(plan.layers[:1], {}, first)
    found = driver(prefix, teacher.layers[1:]).tensors[1]
    before = collect(teacher, batches(), statistics).tensors[1]
    after = collect(apply_plan(teacher, prefix), batches(), statistics).tensors[1]
    assert torch.equal(found["original_token_sample_30"], before["original_token_sample_30"])
    assert torch.equal(found["token_sample_30"], after["token_sample_30"])
    assert not torch.equal(found["token_sample_30"][:, 2:], before["token_sample_30"][:, 2:])
    assert labels == ["statistics of the original model", "statistics of layers 1-1"]


def test_a_pass_ends_after_the_last_layer_that_is_asked_for() -> None:
    teacher, seen = tiny("qwen3_moe"), []
    driver = sequential(teacher, batches(), Camera().requires, silent)
    for layer in teacher.layers:
        layer.block.register_forward_pre_hook(lambda *_, i=layer.index: seen.append(i))
    driver(Plan(), teacher.layers[:1])
    assert seen == [0, 0]


@pytest.mark.parametrize("compressor", [Camera(), NAEE(rows=40, sequential=True)])
def test_methods_plan_through_it_and_the_teacher_stays(compressor) -> None:
    teacher = tiny("qwen3_moe")
    before = {name: t.clone() for name, t in teacher.model.state_dict().items()}
    driver = sequential(teacher, batches(), compressor.requires, silent)
    plan = make_plan(compressor, teacher.layers, StatisticSet(), Ratio(0.5), Uniform(), driver)
    assert len(plan.layers) == 2
    assert plan.lineage["achieved"] == 0.5
    after = teacher.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
