import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.methods.cfes import CFES, mean_distance
from rerail.moe.model import MoEModel
from rerail.plan.allocation import GlobalScore, Uniform
from rerail.plan.budget import Ratio
from rerail.statistics.collect import collect
from rerail.statistics.segments import Segments
from rerail.statistics.statistic import StatisticSet


def filled(model: MoEModel, method: CFES) -> StatisticSet:
    ids = tokens(6, 24)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[4:, 13:] = False  # a padded segment counts with the tokens that it has
    return collect(model, [(ids, mask)], method.requires)


def discrepancy(whole: torch.Tensor, part: torch.Tensor, labels: torch.Tensor) -> float:
    moved = whole - part
    means = [moved[labels == label].mean(dim=0) for label in labels.unique()]
    return float(torch.stack([mean.norm() for mean in means]).mean())


@pytest.mark.parametrize("size", [None, 1, 3, 8])
def test_groups_then_members_are_judged_by_segment_means(size: int | None) -> None:
    model, method = tiny("qwen3_moe"), CFES(segments=12, length=6, size=size)
    held = filled(model, method)
    plan = make_plan(method, model.layers, held, Ratio(0.5), Uniform())
    tensor = held.tensors[1][Segments(12, 6).name]
    hidden, labels, layer = Segments.hidden(tensor), Segments.labels(tensor), model.layers[1]
    whole, left = layer.answer(hidden), list(range(8))

    def best(parts: list[list[int]]) -> list[int]:
        kept = [[slot for slot in left if slot not in part] for part in parts]
        losses = [discrepancy(whole, layer.answer(hidden, k), labels) for k in kept]
        return parts[losses.index(min(losses))]

    while len(left) > 4:
        step = min(size or 3, len(left) - 2)
        group = best([left[i : i + step] for i in range(0, len(left), step)])
        left.remove(best([[slot] for slot in group])[0])
    assert plan.layers[1].kept == tuple(left)


def test_what_cancels_within_a_segment_does_not_count() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    change = torch.zeros(4, 2, 16)
    change[0, :, 0], change[1, :, 0] = 4.0, torch.tensor([4.0, -4.0])
    assert mean_distance(change, labels).tolist() == pytest.approx([2, 0])


def test_the_group_size_is_the_root_of_the_experts() -> None:
    asked = []

    def errors(subsets: list[list[int]]) -> torch.Tensor:
        asked.append([8 - len(kept) for kept in subsets])
        return torch.arange(float(len(subsets)))

    layer, method = tiny("qwen3_moe").layers[0], CFES()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CFES, "errors", lambda *_: errors)
        method.choose(layer, StatisticSet().of(layer, ()), 7, frozenset())
    assert asked == [[3, 3, 2], [1, 1, 1]]


@pytest.mark.parametrize("allocation", [Uniform(), GlobalScore()])
def test_experts_that_nobody_chooses_go_first_and_nothing_breaks(allocation) -> None:
    model, method = tiny("deepseek_v3", n_group=1), CFES(segments=12, length=6, size=1)
    for layer in model.layers:
        layer.router.e_score_correction_bias.zero_()
        layer.router.e_score_correction_bias[[1, 5]] = -100
    plan = make_plan(method, model.layers, filled(model, method), Ratio(0.25), allocation)
    assert all(part.kept == (0, 2, 3, 4, 6, 7) for part in plan.layers)
