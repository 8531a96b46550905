import pytest
import torch

from families import tiny
from rerail.compress.base import make_plan
from rerail.methods.aimer import AIMER
from rerail.moe.model import MoELayer
from rerail.plan.allocation import GlobalScore, Uniform
from rerail.plan.budget import Ratio
from rerail.statistics.statistic import StatisticSet


def score(layer: MoELayer) -> torch.Tensor:
    return AIMER().score(layer, StatisticSet().of(layer, ()))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_score_is_the_root_mean_square_over_the_mean_size(family: str) -> None:
    layer = tiny(family).layers[0]
    for slot, found in enumerate(score(layer)):
        flat = torch.cat([matrix.flatten() for matrix in layer.expert(slot)]).double()
        assert float(found) == pytest.approx(float(flat.square().mean().sqrt() / flat.abs().mean()))


def test_scaling_a_whole_expert_changes_nothing() -> None:
    layer = tiny("qwen3_moe").layers[0]
    before = score(layer)
    for parameter in layer.experts.parameters():
        parameter.data[3] *= 7
    torch.testing.assert_close(score(layer), before, rtol=1e-6, atol=0)


def test_the_evenest_weights_go_first_and_zeros_before_them() -> None:
    model = tiny("qwen3_moe")
    for layer in model.layers:
        for parameter in layer.experts.parameters():
            parameter.data[2] = parameter.data[2].sign()
            parameter.data[5] = 0
    found = score(model.layers[0])
    assert found.argsort()[:2].tolist() == [5, 2]
    assert found[5] == 0
    assert found[2] == pytest.approx(1)
    for allocation in (Uniform(), GlobalScore()):
        plan = make_plan(AIMER(), model.layers, StatisticSet(), Ratio(0.25), allocation)
        assert all(part.kept == (0, 1, 3, 4, 6, 7) for part in plan.layers)


def test_no_text_is_needed() -> None:
    assert AIMER().requires == ()
    assert AIMER(guard="super").requires != ()
