import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.solvers.alignment import permuted
from rerail.methods.m_smoe import MSMoE
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoEModel
from rerail.plan.allocation import GlobalScore, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect
from rerail.statistics.moments import LogitGram
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, StatisticSet

LAYER = tiny("qwen3_moe").layers[0]
COUNTS = torch.tensor([4, 9, 0, 7, 1, 8, 2, 0])


def logits(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, 8, generator=generator, dtype=torch.float64)


def given(z: torch.Tensor, counts: torch.Tensor = COUNTS) -> dict[str, torch.Tensor]:
    return {LogitGram().name: z.mT @ z, Count().name: counts}


def view(z: torch.Tensor, counts: torch.Tensor = COUNTS) -> LayerStatistics:
    return StatisticSet({0: given(z, counts)}).of(LAYER, MSMoE().requires)


def plan_of(teacher: MoEModel, method: MSMoE, held: StatisticSet, removed: float = 0.5) -> Plan:
    return make_plan(method, teacher.layers, held, Ratio(removed), Uniform())


def same_for_all(teacher: MoEModel, z: torch.Tensor, counts: torch.Tensor) -> StatisticSet:
    return StatisticSet({layer.index: given(z, counts) for layer in teacher.layers})


def test_others_join_the_dominant_expert_of_the_most_similar_logits() -> None:
    z = logits()
    found = MSMoE().group(LAYER, view(z), 3).tolist()
    dominants = [1, 3, 5]
    for slot in range(8):
        cosines = [float(torch.cosine_similarity(z[:, slot], z[:, d], dim=0)) for d in dominants]
        label = dominants.index(slot) if slot in dominants else cosines.index(max(cosines))
        assert found[slot] == label


def test_groups_do_not_depend_on_the_scale_of_logits_or_counts() -> None:
    z, scale = logits(1), torch.tensor([1.0, 9, 0.1, 3, 1, 50, 2, 1]).double()
    plain = MSMoE().group(LAYER, view(z), 4)
    assert torch.equal(MSMoE().group(LAYER, view(z * scale, COUNTS * 7), 4), plain)
    assert not torch.equal(MSMoE().group(LAYER, view(logits(2)), 4), plain)


def test_groups_follow_the_experts_when_they_are_renumbered() -> None:
    z, order = logits(3), torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    counts = torch.tensor([4, 9, 3, 7, 1, 8, 2, 0])
    plain = MSMoE().group(LAYER, view(z, counts), 3)
    moved = MSMoE().group(LAYER, view(z[:, order], counts[order]), 3)
    before = {frozenset(torch.nonzero(plain == c).flatten().tolist()) for c in range(3)}
    after = {frozenset(order[moved == c].tolist()) for c in range(3)}
    assert before == after


def test_router_rows_may_stand_in_for_logits() -> None:
    method = MSMoE(similarity_of="rows")
    held = StatisticSet({0: {Count().name: COUNTS}}).of(LAYER, method.requires)
    rows = LAYER.router_rows.double()
    expected = torch.cosine_similarity(rows.unsqueeze(1), rows.unsqueeze(0), dim=-1)
    torch.testing.assert_close(method.similarity(LAYER, held), expected)


def test_layers_compete_and_the_top_expert_of_each_is_dominant() -> None:
    teacher = tiny("qwen3_moe")
    counts = [torch.tensor([97, 1, 1, 1, 0, 0, 0, 0]), torch.full((8,), 10)]
    held = StatisticSet({i: given(logits(i), c) for i, c in enumerate(counts)})
    plan = make_plan(MSMoE(), teacher.layers, held, Ratio(0.5), GlobalScore())
    assert [part.bank.stored for part in plan.layers] == [1, 7]
    assert plan.lineage["achieved"] == 0.5


@pytest.mark.parametrize("align", ["dominant", "first", "none"])
def test_permuting_hidden_units_matters_only_without_alignment(align: str) -> None:
    students = []
    for moved in (False, True):
        teacher = tiny("gpt_oss")
        if moved:
            generator = torch.Generator().manual_seed(0)
            for layer in teacher.layers:
                held = expert_parameters(layer.experts)
                for slot in range(8):
                    own = {n: p[slot].clone() for n, p in held.items()}
                    order = torch.randperm(8, generator=generator)
                    for name, tensor in permuted(own, layer.layout, order).items():
                        held[name][slot] = tensor
        held = collect(teacher, [(tokens(), torch.ones(4, 12).bool())], MSMoE().requires)
        plan = plan_of(teacher, MSMoE(align=align), held)
        students.append(apply_plan(teacher, plan).hidden(tokens(seed=3)))
    changed = float((students[0] - students[1]).abs().max())
    assert changed > 1e-2 if align == "none" else changed < 1e-5


@pytest.mark.parametrize("align", ["dominant", "first"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_permuted_copies_merge_without_a_trace(family: str, align: str) -> None:
    teacher = tiny(family)
    for layer in teacher.layers:
        held = expert_parameters(layer.experts)
        for slot in range(4, 8):
            own = {n: p[slot - 4].clone() for n, p in held.items()}
            order = torch.randperm(8, generator=torch.Generator().manual_seed(slot))
            for name, tensor in permuted(own, layer.layout, order).items():
                held[name][slot] = tensor
    z = logits()
    z[:, 4:] = 2 * z[:, :4]
    counts = torch.tensor([9, 8, 7, 6, 3, 2, 1, 0])
    plan = plan_of(teacher, MSMoE(align=align), same_for_all(teacher, z, counts))
    assert all(part.slots == (0, 1, 2, 3, 0, 1, 2, 3) for part in plan.layers)
    student, ids = apply_plan(teacher, plan), tokens(2, 12, seed=9)
    torch.testing.assert_close(
        student.model(ids).logits, teacher.model(ids).logits, atol=1e-5, rtol=1e-5
    )


def test_merged_weights_are_the_frequency_weighted_mean_of_aligned_members() -> None:
    teacher = tiny("qwen3_moe")
    counts = torch.tensor([30, 20, 5, 5, 0, 0, 0, 0])
    z = logits()
    z[:, 2:5] = z[:, [0]] * torch.tensor([1.0, 2.0, 3.0])
    z[:, 5:] = z[:, [1]] * torch.tensor([1.0, 2.0, 3.0])
    held = same_for_all(teacher, z, counts)
    plain = plan_of(teacher, MSMoE(align="none"), held, removed=0.75)
    assert plain.layers[0].bank.members == (
        ((0, 0, 0.75), (0, 2, 0.125), (0, 3, 0.125), (0, 4, 0.0)),
        ((0, 1, 1.0), (0, 5, 0.0), (0, 6, 0.0), (0, 7, 0.0)),
    )
    plan = plan_of(teacher, MSMoE(), held, removed=0.75)
    for layer in teacher.layers:
        down = plan.tensors[f"layers.{layer.index}.down_proj"]
        own = layer.stack().down
        torch.testing.assert_close(down[1], own[1])
        # every column of the merged expert is 6/8 of the dominant's and 1/8 of one of each other's
        left = down[0] - 0.75 * own[0]
        pairs = 0.125 * (own[2].mT.unsqueeze(1) + own[3].mT.unsqueeze(0))
        distance = (left.mT[:, None, None] - pairs).abs().amax(dim=-1).flatten(1).min(dim=1)
        assert float(distance.values.max()) < 1e-6
        assert len({int(i) // 8 for i in distance.indices}) == 8


def test_without_any_use_everything_stays_finite() -> None:
    teacher = tiny("qwen3_moe")
    held = same_for_all(teacher, torch.zeros(40, 8).double(), torch.zeros(8, dtype=torch.int64))
    plan = plan_of(teacher, MSMoE(), held)
    assert plan.layers[0].kept == tuple(range(8))
    for tensor in plan.tensors.values():
        assert torch.isfinite(tensor).all()
        assert (tensor.flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("align", ["dominant", "first"])
def test_groups_of_one_stay_and_equal_experts_merge_to_the_bit(align: str) -> None:
    teacher = tiny("mixtral")
    teacher.model.to(torch.bfloat16)
    for layer in teacher.layers:
        for parameter in expert_parameters(layer.experts).values():
            parameter[7] = parameter[0]
    z = logits()
    z[:, 7], counts = z[:, 0], torch.tensor([13, 9, 7, 6, 5, 4, 3, 1])
    plan = plan_of(teacher, MSMoE(align=align), same_for_all(teacher, z, counts), removed=0.125)
    for part, layer in zip(plan.layers, teacher.layers, strict=True):
        assert part.slots == (0, 1, 2, 3, 4, 5, 6, 0)
        for name, parameter in expert_parameters(layer.experts).items():
            found = plan.tensors[f"layers.{layer.index}.{name}"]
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, parameter[:7])
