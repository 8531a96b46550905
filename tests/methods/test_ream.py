"""REAM: groups around the most salient experts, aligned by activations and weights."""

import dataclasses

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.sequential import sequential
from rerail.compress.solvers.alignment import channel_features, permuted
from rerail.compress.solvers.channel_matching import (
    ChannelMatching,
    principal_axes,
    unit_distances,
)
from rerail.compress.solvers.grouping import absorbed
from rerail.errors import InputError, OutOfReach
from rerail.methods.ream import REAM
from rerail.methods.reap import MomentScore
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoEModel
from rerail.plan.allocation import GlobalScore, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.recorder import SILENT
from rerail.statistics.collect import Batch, collect
from rerail.statistics.moments import LogitGram
from rerail.statistics.routed import Count, GatedOutput, Moment
from rerail.statistics.statistic import LayerStatistics, StatisticSet
from rerail.statistics.token_sample import TokenSample

ONE_SHOT = REAM(rows=64, sequential=False)
LAYER = tiny("qwen3_moe").layers[0]


def batches() -> list[Batch]:
    ids = tokens(8, 12)
    return [(ids, torch.ones_like(ids).bool())]


def plan_of(teacher: MoEModel, method: object, removed: float = 0.5, **how: object) -> Plan:
    held = how.pop("held", None) or collect(teacher, batches(), method.requires)
    return make_plan(method, teacher.layers, held, Ratio(removed), Uniform(), **how)


def by_hand(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    outputs = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    x = torch.randn(48, 16, generator=generator)
    found = {
        Moment(1, 1).name: torch.tensor([8.0, 30, 2, 20, 3, 24, 1, 0]),
        Count().name: torch.tensor([2, 3, 2, 2, 3, 2, 1, 0]),
        LogitGram().name: z.mT @ z,
        GatedOutput(1).name: outputs,
        TokenSample(64).name: torch.cat([torch.zeros(48, 2), x], dim=1),
    }
    return {**found, **changed}


def view(method: REAM = ONE_SHOT, **changed: torch.Tensor) -> LayerStatistics:
    return StatisticSet({0: by_hand(**changed)}).of(LAYER, method.requires)


def same(teacher: MoEModel, **changed: torch.Tensor) -> StatisticSet:
    return StatisticSet({layer.index: by_hand(**changed) for layer in teacher.layers})


# ---- limits


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("driven", [False, True])
def test_groups_of_one_are_reap_to_the_bit(family: str, driven: bool) -> None:
    teacher = tiny(family)
    pair = REAM(size=1, sequential=driven), MomentScore(sequential=driven)
    plans = []
    for method in pair:
        again = sequential(teacher, batches(), method.requires, lambda _: SILENT.progress(""))
        plans.append(plan_of(teacher, method, remeasure=again if driven else None))
    assert plans[0].layers == plans[1].layers
    students = [apply_plan(teacher, plan) for plan in plans]
    ids = tokens(2, 12, seed=3)
    assert torch.equal(students[0].hidden(ids), students[1].hidden(ids))


def test_one_centroid_with_room_for_all_is_one_group() -> None:
    method = dataclasses.replace(ONE_SHOT, size=8, router="remap")
    assert method.group(LAYER, view(method), 1).tolist() == [0] * 8
    with pytest.raises(OutOfReach, match=r"1 groups of at most 7 have no room for 8 .* 0 to 0.75"):
        dataclasses.replace(method, size=7).check([LAYER], Ratio(0.875), Uniform())


def test_no_limit_joins_every_expert_to_its_most_similar_centroid() -> None:
    method = dataclasses.replace(ONE_SHOT, size=None)
    labels = method.group(LAYER, view(method), 3)
    centroids = method.dominants(LAYER, view(method), 3)
    similarity = method.similarity(LAYER, view(method))
    for slot in set(range(8)) - set(centroids):
        assert int(labels[slot]) == int(similarity[slot, list(centroids)].argmax())


def test_all_experts_kept_is_the_model_to_the_bit() -> None:
    decision = ONE_SHOT.decide_layer(LAYER, view(), 8)
    assert decision.plan.bank.members == tuple(((0, e, 1.0),) for e in range(8))
    assert decision.plan.kept == tuple(range(8))


# ---- groups


def test_the_most_salient_centroid_takes_its_fill_first() -> None:
    similarity = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    similarity = (similarity + similarity.T) / 2
    turns = [7, 2, 4]
    found = absorbed(similarity, turns, 4).tolist()
    free = [e for e in range(10) if e not in turns]
    for label, centroid in enumerate(turns):
        taken = sorted(free, key=lambda e: -float(similarity[centroid, e]))[:3]
        assert {e for e, x in enumerate(found) if x == label} == {centroid, *taken}
        free = [e for e in free if e not in taken]
    assert free == []


@pytest.mark.parametrize(
    ("experts", "count", "size", "sizes"),
    [(128, 96, 16, [16, 16, 3]), (128, 64, 32, [32, 32, 3]), (512, 384, 32, [32] * 4 + [5])],
)
def test_only_a_handful_of_experts_is_changed(experts, count, size, sizes) -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(experts, experts, generator=generator)
    turns = torch.randperm(experts, generator=generator)[:count].tolist()
    found = torch.bincount(absorbed(similarity, turns, size)).tolist()
    assert found == sizes + [1] * (count - len(sizes))


def test_centroids_are_the_most_salient_and_take_turns_by_saliency() -> None:
    method = dataclasses.replace(ONE_SHOT, size=4)
    labels = method.group(LAYER, view(method), 4)
    # means 4, 10, 1, 10, 1, 12, 1, 0: of those that are equal the lower slot comes first
    assert method.dominants(LAYER, view(method), 4) == (0, 1, 3, 5)
    assert labels[[0, 1, 3, 5]].tolist() == [0, 1, 2, 3]
    similarity = method.similarity(LAYER, view(method))
    first = sorted((2, 4, 6, 7), key=lambda e: -float(similarity[5, e]))[:3]
    assert {e for e in range(8) if labels[e] == 3} == {5, *first}
    left = ({2, 4, 6, 7} - set(first)).pop()
    assert labels[left] == 1


def test_never_chosen_experts_count_as_the_least_that_were() -> None:
    found = ONE_SHOT.weights(view()).tolist()
    assert found == [4, 10, 1, 10, 1, 12, 1, 0.5]
    small = {Moment(1, 1).name: torch.tensor([8.0, 30, 0.2, 20, 3, 24, 1, 0])}
    assert ONE_SHOT.weights(view(**small)).tolist()[-1] == pytest.approx(0.1)
    nothing = {Moment(1, 1).name: torch.zeros(8)}
    assert ONE_SHOT.weights(view(**nothing)).tolist() == [0.5] * 8


def test_similarity_is_that_of_mean_gated_outputs_and_of_logit_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    outputs = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    unit = z / z.norm(dim=0)
    apart = torch.cdist(unit.T, unit.T)
    cosines = torch.cosine_similarity(outputs.unsqueeze(1), outputs.unsqueeze(0), dim=-1)
    expected = 0.5 * (0.5 * (1 + cosines) + 1 - apart / apart.max())
    torch.testing.assert_close(ONE_SHOT.similarity(LAYER, view()), expected, atol=1e-7, rtol=0)


def test_gates_move_the_mean_output_and_cannot_move_cosines_token_by_token() -> None:
    """Eq. 8 as printed gates every token's output, and no positive gate changes a cosine."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 30, 16, generator=generator, dtype=torch.float64)
    gates = torch.rand(2, 30, 1, generator=generator, dtype=torch.float64)
    by_token = [torch.cosine_similarity(*each, dim=1).mean() for each in (y, gates * y)]
    of_means = [torch.cosine_similarity(*each.sum(dim=1), dim=0) for each in (y, gates * y)]
    torch.testing.assert_close(*by_token)
    assert abs(float(of_means[0] - of_means[1])) > 1e-3
    method = dataclasses.replace(ONE_SHOT, outputs="token")
    doubled = {GatedOutput(1).name: torch.zeros(8, 16)}
    found = method.similarity(LAYER, view(method, **doubled))
    assert (found - ONE_SHOT.similarity(LAYER, view())).abs().max() > 1e-3


# ---- alignment


def permuted_copies(teacher: MoEModel) -> None:
    """Make experts 4-7 those of 0-3 with their hidden units in another order."""
    for layer in teacher.layers:
        held = expert_parameters(layer.experts)
        for slot in range(4, 8):
            own = {n: p[slot - 4].clone() for n, p in held.items()}
            order = torch.randperm(8, generator=torch.Generator().manual_seed(slot))
            for name, tensor in permuted(own, layer.layout, order).items():
                held[name][slot] = tensor


@pytest.mark.parametrize("by", ["both", "activations", "weights"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_permuted_copies_are_put_back_in_order(family: str, by: str) -> None:
    teacher = tiny(family)
    permuted_copies(teacher)
    layer = teacher.layers[0]
    inputs = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    matching = ChannelMatching(layer, inputs, by)
    for slot in range(4, 8):
        stock = expert_parameters(layer.experts)
        own = {n: p.detach()[slot] for n, p in stock.items()}
        found = permuted(own, layer.layout, matching.order(slot - 4, slot))
        assert all(torch.equal(t, stock[n][slot - 4]) for n, t in found.items())
        assert sorted(matching.order(0, slot).tolist()) == list(range(8))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_permuted_copies_merge_without_a_trace(family: str) -> None:
    teacher = tiny(family)
    permuted_copies(teacher)
    outputs = by_hand()[GatedOutput(1).name]
    z = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs[4:], z[:, 4:] = outputs[:4], z[:, :4]
    held = same(
        teacher,
        **{
            GatedOutput(1).name: outputs,
            LogitGram().name: z.mT @ z,
            Moment(1, 1).name: torch.tensor([9.0, 8, 7, 6, 3, 2, 1, 0]),
            Count().name: torch.ones(8).long(),
        },
    )
    method = dataclasses.replace(ONE_SHOT, size=2, router="remap")
    plan = plan_of(teacher, method, held=held)
    assert all(part.slots == (0, 1, 2, 3, 0, 1, 2, 3) for part in plan.layers)
    student, ids = apply_plan(teacher, plan), tokens(2, 12, seed=9)
    torch.testing.assert_close(student.hidden(ids), teacher.hidden(ids), atol=1e-5, rtol=1e-5)
    loose = plan_of(teacher, dataclasses.replace(method, align="none"), held=held)
    assert (apply_plan(teacher, loose).hidden(ids) - teacher.hidden(ids)).abs().max() > 1e-2


def test_components_that_hold_all_rows_keep_all_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    rows = small @ torch.randn(5, 40, generator=generator, dtype=torch.float64)
    mean, axes = principal_axes(lambda: rows.split(7), 6)
    centred = rows - rows.mean(dim=0)
    torch.testing.assert_close(mean, rows.mean(dim=0))
    found = unit_distances(centred @ axes, centred @ axes)
    torch.testing.assert_close(found, unit_distances(centred, centred), atol=1e-6, rtol=0)


def test_components_are_those_of_the_svd() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(6, 0.1, 40, dtype=torch.float64).exp()
    rows = torch.randn(200, 40, generator=generator, dtype=torch.float64) * scale
    _, axes = principal_axes(lambda: [rows], 4)
    v = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False).Vh[:4].mT
    torch.testing.assert_close((v.mT @ axes).abs(), torch.eye(4, dtype=v.dtype), atol=1e-5, rtol=0)
    again = principal_axes(lambda: [rows], 4)[1]
    assert torch.equal(axes, again)


def test_distances_are_those_of_unit_rows_and_of_nothing_finite() -> None:
    a = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = torch.cat([a[:2] * 3, torch.zeros(1, 6, dtype=torch.float64)])
    found = unit_distances(a, b)
    expected = torch.cdist(
        torch.nn.functional.normalize(a, dim=1), torch.nn.functional.normalize(b, dim=1)
    )
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    assert found[0, 0] < 1e-7


def test_costs_add_those_of_activations_and_weights() -> None:
    layer = tiny("mixtral").layers[0]
    inputs = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    both = ChannelMatching(layer, inputs, "both", axes=48)
    gate, up, _ = layer.stack()
    series = [torch.nn.functional.silu(inputs @ gate[e].T) * (inputs @ up[e].T) for e in (1, 6)]
    own = {n: p.detach() for n, p in expert_parameters(layer.experts).items()}
    flat = torch.cat(
        [channel_features({n: p[e] for n, p in own.items()}, layer.layout) for e in range(8)]
    )
    unit = torch.nn.functional.normalize(flat, dim=1)
    centred = unit - unit.mean(dim=0)
    scores = centred.view(8, 24, 48)  # all components: a rotation, which keeps distances
    cost = unit_distances(*(s.T for s in series)) + unit_distances(scores[1], scores[6])
    order = both.order(1, 6)
    best = cost.numpy()[linear_sum_assignment(cost.numpy())].sum()
    assert float(cost[torch.arange(24), order].sum()) == pytest.approx(float(best), rel=1e-5)


# ---- the plan


def test_merged_experts_are_weighted_by_saliency_and_others_stay_to_the_bit() -> None:
    teacher = tiny("qwen3_moe")
    teacher.model.to(torch.bfloat16)
    method = dataclasses.replace(ONE_SHOT, size=4, align="none")
    plan = plan_of(teacher, method, held=same(teacher))
    labels = method.group(LAYER, view(method), 4)
    weight = ONE_SHOT.weights(view())
    for group, members in enumerate(plan.layers[0].bank.members):
        slots = torch.nonzero(labels == group).flatten()
        share = weight[slots] / weight[slots].sum()
        assert [(e, w) for _, e, w in members] == list(
            zip(slots.tolist(), share.tolist(), strict=True)
        )
    aligned = plan_of(teacher, dataclasses.replace(method, align="both"), held=same(teacher))
    for group, members in enumerate(plan.layers[0].bank.members):
        if len(members) == 1:
            for name, parameter in expert_parameters(teacher.layers[0].experts).items():
                stored = aligned.tensors[f"layers.0.{name}"]
                assert torch.equal(stored[group], parameter[members[0][1]])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_router_rows_and_correction_biases_are_those_of_the_centroids(family: str) -> None:
    teacher = tiny(family)
    plan = plan_of(teacher, ONE_SHOT)
    student = apply_plan(teacher, plan)
    for part, old, new in zip(plan.layers, teacher.layers, student.layers, strict=True):
        assert part.router == "slice"
        assert torch.equal(new.router_rows, old.router_rows[list(part.kept)])
        assert part.slots == (0, 1, 2, 3)
        assert new.row_size == old.row_size
    assert len({part.kept for part in plan.layers}) >= 1


def test_later_layers_are_measured_behind_merged_ones() -> None:
    teacher = tiny("qwen3_moe")
    method = REAM(rows=64)
    again = sequential(teacher, batches(), method.requires, lambda _: SILENT.progress(""))
    driven = plan_of(teacher, method, remeasure=again)
    plain = plan_of(teacher, ONE_SHOT)
    assert method.driver == "sequential"
    assert ONE_SHOT.driver == "one_shot"
    assert driven.layers[0] == plain.layers[0]
    name = "layers.1.down_proj"
    assert torch.equal(driven.tensors["layers.0.down_proj"], plain.tensors["layers.0.down_proj"])
    assert not torch.equal(driven.tensors[name], plain.tensors[name])


def test_what_cannot_be_is_refused_with_a_sentence() -> None:
    layers = tiny("qwen3_moe").layers
    with pytest.raises(OutOfReach, match=r"sequential=true measures one layer .* allowed"):
        REAM().check(layers, Ratio(0.5), GlobalScore())
    ONE_SHOT.check(layers, Ratio(0.5), GlobalScore())
    with pytest.raises(InputError, match="size=0 must be at least 1"):
        REAM(size=0)
    with pytest.raises(InputError, match="size=1 merges nothing"):
        REAM(size=1, router="remap")
    with pytest.raises(OutOfReach, match="at least 2 are needed"):
        REAM().check(layers, Ratio(0.875), Uniform())
