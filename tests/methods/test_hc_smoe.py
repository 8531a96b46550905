import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from families import CONFIGS, tiny, tokens
from rerail.compress.base import make_plan
from rerail.methods.hc_smoe import HCSMoE
from rerail.moe.fused_experts import expert_parameters
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.statistics.collect import Batch, collect
from rerail.statistics.dense import OutputSum, TokenCount
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, StatisticSet

LAYER = tiny("qwen3_moe").layers[0]


def view(outputs: torch.Tensor, counts: torch.Tensor | None = None) -> LayerStatistics:
    held = {
        OutputSum().name: outputs.double() * 10,
        TokenCount().name: torch.full((len(outputs),), 10),
        Count().name: torch.ones(len(outputs)).long() if counts is None else counts,
    }
    return StatisticSet({0: held}).of(LAYER, HCSMoE().requires)


def outputs(seed: int, experts: int = 8) -> torch.Tensor:
    return torch.randn(experts, 16, generator=torch.Generator().manual_seed(seed))


def labels(method: HCSMoE, found: torch.Tensor, count: int) -> list[int]:
    return method.group(LAYER, view(found), count).tolist()


def partition(found: list[int]) -> set[frozenset[int]]:
    return {frozenset(i for i, x in enumerate(found) if x == label) for label in set(found)}


def by_definition(points: torch.Tensor, count: int) -> set[frozenset[int]]:
    """Join the two clusters of least mean distance until `count` are left."""
    distance = torch.cdist(points.double(), points.double())
    clusters = [frozenset({i}) for i in range(len(points))]
    while len(clusters) > count:
        pairs = [(a, b) for a in clusters for b in clusters if min(a) < min(b)]
        a, b = min(pairs, key=lambda p: float(distance[list(p[0])][:, list(p[1])].mean()))
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
    return set(clusters)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_average_linkage_for_every_number(seed: int) -> None:
    points, before = outputs(seed), None
    tree = linkage(points.double().numpy(), method="average")
    for count in range(8, 0, -1):
        found = labels(HCSMoE(), points, count)
        assert sorted(set(found)) == list(range(count))
        assert partition(found) == by_definition(points, count)
        assert partition(found) == partition(fcluster(tree, count, "maxclust").tolist())
        firsts = [found.index(label) for label in range(count)]
        assert firsts == sorted(firsts)
        if before is not None:
            assert all(any(small <= big for big in partition(found)) for small in before)
        before = partition(found)


def test_copies_are_grouped_first_also_with_ties() -> None:
    points = outputs(0)
    points[[4, 6]], points[7] = points[1].clone(), points[2].clone()
    assert partition(labels(HCSMoE(), points, 5)) == {
        frozenset({1, 4, 6}),
        frozenset({2, 7}),
        *(frozenset({i}) for i in (0, 3, 5)),
    }
    assert sorted(set(labels(HCSMoE(), torch.ones(8, 16), 3))) == [0, 1, 2]


def test_a_partition_follows_the_experts_when_they_are_renumbered() -> None:
    points, order = outputs(3), torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    plain, moved = labels(HCSMoE(), points, 4), labels(HCSMoE(), points[order], 4)
    renumbered = [frozenset(int(order[i]) for i in group) for group in partition(moved)]
    assert set(renumbered) == partition(plain)


def test_linkages_differ() -> None:
    found = {
        name: [tuple(labels(HCSMoE(linkage=name), outputs(s), 3)) for s in range(8)]
        for name in ("average", "single", "complete", "ward")
    }
    assert len({tuple(v) for v in found.values()}) == 4


def test_equal_usage_merges_as_the_average() -> None:
    counts = torch.full((8,), 5)
    frequency = HCSMoE().weights(view(outputs(0), counts))
    average = HCSMoE(merge="average").weights(view(outputs(0), torch.arange(8)))
    np.testing.assert_allclose(frequency / frequency.sum(), average / average.sum())


def batches() -> list[Batch]:
    ids = tokens(4, 16)
    return [(ids, torch.ones_like(ids, dtype=torch.bool))]


@pytest.mark.parametrize("family", CONFIGS)
def test_identical_experts_are_merged_without_a_trace(family: str) -> None:
    teacher = tiny(family)
    for layer in teacher.layers:
        for parameter in expert_parameters(layer.experts).values():
            parameter.data = parameter.data[[0, 1, 2, 3, 0, 1, 2, 3]]
    filled = collect(teacher, batches(), HCSMoE().requires)
    plan = make_plan(HCSMoE(), teacher.layers, filled, Ratio(0.5), Uniform())
    assert all(part.slots == (0, 1, 2, 3, 0, 1, 2, 3) for part in plan.layers)
    student, ids = apply_plan(teacher, plan), tokens(2, 12, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(
            student.model(ids).logits, teacher.model(ids).logits, atol=1e-5, rtol=1e-5
        )


def test_a_single_member_is_untouched_and_an_unused_cluster_is_averaged() -> None:
    teacher = tiny("qwen3_moe")
    points = outputs(0)
    points[[4, 6]] = points[1].clone()
    counts = torch.tensor([3, 0, 1, 1, 0, 1, 0, 1])
    held = {s.name: t for s, t in view(points, counts).items()}
    found = StatisticSet({0: held, 1: held})
    student = apply_plan(
        teacher, make_plan(HCSMoE(), teacher.layers, found, Ratio(0.25), Uniform())
    )
    assert student.layers[0].router_rows is teacher.layers[0].router_rows
    old, new = teacher.layers[0].stack(), student.layers[0].stack()
    for before, after in zip(old, new, strict=True):
        for expert in (0, 2, 3, 5, 7):
            assert torch.equal(after[expert], before[expert])
        for expert in (1, 4, 6):
            torch.testing.assert_close(after[expert], before[[1, 4, 6]].mean(dim=0))


def test_hidden_units_are_not_aligned_before_merging() -> None:
    """Permuting one expert's hidden units changes no function, but it changes what is merged."""
    students, order = [], torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    for permuted in (False, True):
        teacher = tiny("qwen3_moe")
        if permuted:
            for layer in teacher.layers:
                gate_up, down = layer.experts.gate_up_proj.data, layer.experts.down_proj.data
                gate_up[2] = gate_up[2][torch.cat([order, order + 8])]
                down[2] = down[2][:, order]
        filled = collect(teacher, batches(), HCSMoE().requires)
        plan = make_plan(HCSMoE(), teacher.layers, filled, Ratio(0.875), Uniform())
        students.append(
            (plan, teacher.hidden(tokens()), apply_plan(teacher, plan).hidden(tokens()))
        )
    (plan, spoken, merged), (other, same, changed) = students
    assert [part.slots for part in plan.layers] == [part.slots for part in other.layers]
    torch.testing.assert_close(spoken, same, atol=1e-5, rtol=1e-5)
    assert (merged - changed).abs().max() > 1e-2
