import dataclasses

import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.solvers.grouping import cosine, group_members, shares_in_group
from rerail.compress.templates.merger import Merger
from rerail.errors import OutOfReach
from rerail.methods.hc_smoe import HCSMoE
from rerail.methods.m_smoe import MSMoE
from rerail.methods.merge_moe import MergeMoE
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoEModel
from rerail.plan.allocation import GlobalScore, PerLayer, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect
from rerail.statistics.dense import OutputSum, TokenCount
from rerail.statistics.routed import Count
from rerail.statistics.statistic import StatisticSet


def test_members_are_weighted_by_their_share_of_the_group() -> None:
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    weights = torch.tensor([3, 0, 1, 0, 7, 0])
    assert group_members(4, labels, weights) == (
        ((4, 0, 0.75), (4, 2, 0.25)),
        ((4, 1, 0.5), (4, 3, 0.5)),
        ((4, 4, 1.0), (4, 5, 0.0)),
    )


def filled(counts: list[torch.Tensor]) -> StatisticSet:
    generator = torch.Generator().manual_seed(0)
    held = {}
    for i, count in enumerate(counts):
        outputs = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        tokens = torch.full((8,), 10)
        held[i] = {
            OutputSum().name: outputs,
            TokenCount().name: tokens,
            Count().name: count,
        }
    return StatisticSet(held)


def test_mergers_may_store_fewer_experts_than_top_k() -> None:
    layers = tiny("qwen3_moe").layers
    plan = make_plan(HCSMoE(), layers, filled([torch.ones(8).long()] * 2), Ratio(0.875), Uniform())
    assert [part.bank.stored for part in plan.layers] == [1, 1]
    assert all(part.kept == tuple(range(8)) for part in plan.layers)


def test_groups_may_be_allocated_by_usage() -> None:
    layers = tiny("qwen3_moe").layers
    skewed, even = torch.tensor([97, 1, 1, 1, 0, 0, 0, 0]), torch.full((8,), 10)
    plan = make_plan(HCSMoE(), layers, filled([skewed, even]), Ratio(0.5), GlobalScore())
    assert [part.bank.stored for part in plan.layers] == [1, 7]
    assert plan.lineage["achieved"] == 0.5


def test_no_group_at_all_is_refused() -> None:
    with pytest.raises(OutOfReach, match=r"at least 1 .* allowed ratios: 0 to 0.875"):
        HCSMoE().check(tiny("qwen3_moe").layers, Ratio(0.875 + 1e-3), PerNothing())


class PerNothing(Uniform):
    def shares(self, layers, removed, least, scores=None):
        return [1.0] * len(layers)


MERGERS = [HCSMoE(), MSMoE(), MSMoE(align="none"), MergeMoE(inputs=48)]
FAMILIES = ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"]


def planned(
    teacher: MoEModel, method: Merger, removed: float = 0.5, router: str = "remap", **other: str
) -> Plan:
    method = dataclasses.replace(method, router=router, **other)
    batch = (tokens(4, 12), torch.ones(4, 12).bool())
    held = collect(teacher, [batch], method.requires)
    return make_plan(method, teacher.layers, held, Ratio(removed), Uniform())


def names(method: Merger) -> str:
    return f"{type(method).__name__}-{getattr(method, 'align', '')}"


def test_shares_sum_to_one_and_minimise_the_weighted_distance_to_the_members() -> None:
    labels, counts = torch.tensor([0, 0, 1, 0, 1]), torch.tensor([5, 2, 0, 1, 0])
    share = shares_in_group(labels, counts)
    assert share.tolist() == [5 / 8, 2 / 8, 1 / 2, 1 / 8, 1 / 2]
    outputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = (share[:, None] * outputs)[labels == 0].sum(dim=0).requires_grad_()
    distance = (counts[:, None] * (mean - outputs).square())[labels == 0].sum()
    [slope] = torch.autograd.grad(distance, mean)
    torch.testing.assert_close(slope, torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)


def test_cosine_of_nothing_is_zero() -> None:
    points = torch.tensor([[3.0, 4], [0, 0], [8, 6]])
    found = cosine(points @ points.mT)
    expected = torch.tensor([[1, 0, 0.96], [0, 0, 0], [0.96, 0, 1]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", MERGERS, ids=names)
def test_a_remapped_student_is_the_model_with_a_copy_in_every_slot(
    method: Merger, family: str
) -> None:
    teacher = tiny(family)
    student = apply_plan(teacher, planned(teacher, method))
    ids, spoken = tokens(2, 12, seed=4), {}
    for form in ("shared", "copied"):
        for implementation in ("eager", "grouped_mm"):
            student.model.set_experts_implementation(implementation)
            spoken[form, implementation] = student.model(ids).logits
        for layer in student.layers:
            layer.swap(layer.stock())
    for logits in spoken.values():
        torch.testing.assert_close(logits, spoken["copied", "eager"], rtol=1e-6, atol=2e-6)


def test_gates_of_one_group_add_up_and_are_not_normalised_again() -> None:
    teacher = tiny("qwen3_moe")
    plan = planned(teacher, MSMoE(), removed=0.75)
    bank = apply_plan(teacher, plan).layers[0].experts
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    index, gates = teacher.layers[0].route(x)
    labels = torch.tensor(plan.layers[0].slots)
    summed = torch.zeros(20, 2).scatter_add_(1, labels[index], gates)
    torch.testing.assert_close(summed.sum(dim=1), gates.sum(dim=1))
    first = torch.tensor([plan.layers[0].slots.index(c) for c in range(2)]).expand(20, 2)
    assert ((summed == 0).any(dim=1)).any()
    torch.testing.assert_close(bank(x, first, summed), bank(x, index, gates), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("method", MERGERS, ids=names)
def test_identical_experts_leave_no_trace_under_remap(method: Merger, family: str) -> None:
    teacher = tiny(family)
    for layer in teacher.layers:
        for parameter in expert_parameters(layer.experts).values():
            parameter.data = parameter.data[:1].repeat(8, *[1] * (parameter.dim() - 1))
    student, ids = apply_plan(teacher, planned(teacher, method, removed=0.75)), tokens(seed=9)
    assert all(layer.experts.spec.stored == 2 for layer in student.layers)
    torch.testing.assert_close(
        student.model(ids).logits, teacher.model(ids).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("method", MERGERS, ids=names)
def test_centroid_rows_are_those_of_the_most_used_members(method: Merger) -> None:
    teacher = tiny("qwen3_moe")
    plan = planned(teacher, method, router="centroid")
    remapped = planned(teacher, method)
    student = apply_plan(teacher, plan)
    held = collect(teacher, [(tokens(4, 12), torch.ones(4, 12).bool())], [Count()])
    for part, same, old, new in zip(
        plan.layers, remapped.layers, teacher.layers, student.layers, strict=True
    ):
        counts = held.tensors[part.layer]["count"]
        assert part.router == "slice"
        for kept, label in zip(part.kept, part.slots, strict=True):
            members = [e for e, other in enumerate(same.slots) if other == label]
            assert kept in members
            assert counts[kept] == counts[members].max()
        assert sorted(part.slots) == [0, 1, 2, 3]
        assert torch.equal(new.router_rows, old.router_rows[list(part.kept)])
        assert new.num_experts == 4


@pytest.mark.parametrize("pooling", ["weighted", "mean"])
@pytest.mark.parametrize(
    ("family", "method"),
    [("qwen3_moe", HCSMoE()), ("gpt_oss", MSMoE()), ("deepseek_v3", MSMoE())],
    ids=["qwen3_moe", "gpt_oss", "deepseek_v3"],
)
def test_pooled_rows_are_means_and_biases_follow_the_centroids(
    family: str, method: Merger, pooling: str
) -> None:
    teacher = tiny(family)
    plan = planned(teacher, method, router="pooled", pooling=pooling)
    student = apply_plan(teacher, plan)
    held = collect(teacher, [(tokens(4, 12), torch.ones(4, 12).bool())], method.requires)
    for part, old, new in zip(plan.layers, teacher.layers, student.layers, strict=True):
        view = held.of(old, method.requires)
        grouped = dataclasses.replace(method, router="pooled")
        labels = grouped.group(old, view, 4)
        counts = view[Count()] if pooling == "weighted" else torch.ones(8)
        for row, label in enumerate(part.slots):
            weights = (counts * (labels == label)).double()
            weights = weights if weights.sum() else (labels == label).double()
            expected = (weights / weights.sum()) @ old.router_rows.double()
            torch.testing.assert_close(new.router_rows[row].double(), expected)
        if family == "gpt_oss":
            assert torch.equal(new.router.bias, old.router.bias[list(part.kept)])
        if family == "deepseek_v3":
            old_bias, new_bias = (m.router.e_score_correction_bias for m in (old, new))
            assert torch.equal(new_bias, old_bias[list(part.kept)])
            assert [slot // 4 for slot in part.kept] == [0, 0, 1, 1]


@pytest.mark.parametrize("router", ["centroid", "pooled"])
def test_every_group_of_one_keeps_the_router_to_the_bit(router: str) -> None:
    teacher = tiny("qwen3_moe")
    held = collect(teacher, [(tokens(), torch.ones(4, 12).bool())], MSMoE().requires)
    plan = make_plan(MSMoE(router=router), teacher.layers, held, Ratio(0.5), PerLayer((8, 4)))
    student = apply_plan(teacher, plan)
    assert torch.equal(student.layers[0].router_rows, teacher.layers[0].router_rows)
    assert [part.bank.kind for part in plan.layers] == ["dense", "merged"]


@pytest.mark.parametrize("router", ["centroid", "pooled"])
def test_fewer_rows_than_top_k_are_refused(router: str) -> None:
    layers = tiny("qwen3_moe").layers
    MSMoE(router=router).check(layers, Ratio(0.75), Uniform())
    MSMoE().check(layers, Ratio(0.875), Uniform())
    with pytest.raises(OutOfReach, match=r"at least 2 are needed .* allowed ratios: 0 to 0.75"):
        MSMoE(router=router).check(layers, Ratio(0.875), Uniform())


def test_grouped_routers_stay_equal_or_are_refused() -> None:
    layers = tiny("deepseek_v3").layers
    for method in (HCSMoE(), MSMoE(), MergeMoE()):
        method.check(layers, Ratio(0.875), Uniform())
    MSMoE(router="centroid").check(layers, Ratio(0.25), Uniform())
    with pytest.raises(OutOfReach, match=r"ratios from 0 to 0, or compressor.router=remap"):
        HCSMoE(router="centroid").check(layers, Ratio(0.5), Uniform())
    with pytest.raises(OutOfReach, match="multiples of 2 rows a layer and allocation=uniform"):
        MSMoE(router="centroid").check(layers, Ratio(0.375), Uniform())
    with pytest.raises(OutOfReach, match="allocation=uniform"):
        MergeMoE(router="pooled").check(layers, Ratio(0.5), GlobalScore())
