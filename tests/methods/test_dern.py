"""DERN: segments of dropped experts move to kept ones, and become as many as before."""

import dataclasses

import pytest
import torch

from families import CONFIGS, tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.solvers.segments import (
    Absorption,
    Segments,
    fused_segments,
    nearest,
    redistributed,
    segments_of,
    signs_are_free,
    spherical_k_means,
)
from rerail.errors import InputError, OutOfReach
from rerail.methods.dern import DERN
from rerail.methods.reap import MomentScore
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.routed import Count, Moment
from rerail.statistics.statistic import StatisticSet

MASS = torch.tensor([4.0, 9, 0, 7, 1, 8, 2, 0])
KEPT = (0, 1, 3, 5)
LOOSE = DERN(alpha=0.1)


def plan_of(teacher: MoEModel, method: object = LOOSE, removed: float = 0.5) -> Plan:
    both = {Moment(1, 0).name: MASS.double(), Count().name: MASS.long()}
    held = StatisticSet({layer.index: both for layer in teacher.layers})
    return make_plan(method, teacher.layers, held, Ratio(removed), Uniform())


def inputs(count: int = 20) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(2))


def answers(layer: MoELayer, slot: int, x: torch.Tensor) -> torch.Tensor:
    return layer.run(x, torch.full((len(x), 1), slot), torch.ones(len(x), 1))


def copy_experts(teacher: MoEModel, pairs: dict[int, int]) -> None:
    """Make the expert of each key that of its value."""
    for layer in teacher.layers:
        for parameter in expert_parameters(layer.experts).values():
            for slot, source in pairs.items():
                parameter[slot] = parameter[source]


def flip(teacher: MoEModel, seed: int = 0) -> None:
    """Change the sign of u and d of random channels: no function changes."""
    generator = torch.Generator().manual_seed(seed)
    for layer in teacher.layers:
        sign = torch.where(torch.rand(8, 8, generator=generator) < 0.5, -1.0, 1.0)
        stock = expert_parameters(layer.experts)
        stock["gate_up_proj"][:, 8:] *= sign.unsqueeze(2)
        stock["down_proj"] *= sign.unsqueeze(1)


def random_segments(count: int, seed: int = 0) -> Segments:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(count, n, generator=generator, dtype=torch.float64) for n in (3, 6)]
    return Segments(*parts)


# ---- segments


@pytest.mark.parametrize("family", CONFIGS)
def test_segments_are_the_expert(family: str) -> None:
    layer = tiny(family).layers[0]
    segments = segments_of(layer)
    assert segments.gate.shape[:2] == (8, layer.intermediate_size)
    back = fused_segments(layer, segments.at([5, 2]), [5, 2])
    for name, parameter in expert_parameters(layer.experts).items():
        assert torch.equal(back[name], parameter[[5, 2]])


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_answers_of_single_segments_add_up_to_that_of_the_expert(family: str) -> None:
    layer, x = tiny(family).layers[0], inputs()
    segments, total = segments_of(layer).at([3]), torch.zeros(20, 16)
    for j in range(layer.intermediate_size):
        only = torch.zeros(1, layer.intermediate_size, 1)
        only[:, j] = 1
        single = fused_segments(layer, Segments(*(part * only for part in segments)), [3])
        zero = torch.zeros(20, 1, dtype=torch.int64)
        total += layer.run(x, zero, torch.ones(20, 1), **single)
    torch.testing.assert_close(total, answers(layer, 3, x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_signs_are_free_but_where_a_family_adds_one_to_up(family: str) -> None:
    assert signs_are_free(tiny(family).layers[0]) == (family != "gpt_oss")


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("features", ["up_down", "all"])
def test_the_nearest_segment_is_that_of_the_highest_cosine(features: str, signs: bool) -> None:
    some, others = random_segments(9), random_segments(12, seed=1)
    index, cosine = nearest(some, others, features, signs)
    first = 0 if features == "all" else 3
    for i in range(9):
        found = []
        for sign in (1, -1) if signs else (1,):
            a = torch.cat([some.gate[i], some.rest[i]])[first:]
            b = torch.cat([others.gate, sign * others.rest], dim=1)[:, first:]
            found.append(torch.cosine_similarity(a.unsqueeze(0), b, dim=1))
        best = torch.stack(found).amax(dim=0)
        assert int(index[i]) == int(best.argmax())
        assert float(cosine[i]) == pytest.approx(float(best.max()))


# ---- clusters


def test_clusters_of_one_are_the_segments_to_the_bit_and_every_cluster_has_a_member() -> None:
    some = random_segments(6)
    made, labels = spherical_k_means(some, torch.ones(6), torch.arange(6), True)
    assert labels.tolist() == list(range(6))
    assert all(torch.equal(a, b) for a, b in zip(made, some, strict=True))
    twins = Segments(*(part[[0, 0, 0, 0, 1, 1]] for part in some))
    made, labels = spherical_k_means(twins, torch.ones(6), torch.arange(4), True)
    assert sorted(set(labels.tolist())) == [0, 1, 2, 3]
    assert all(torch.isfinite(part).all() for part in made)


def test_a_mean_has_its_members_weighted_direction_and_their_mean_norm() -> None:
    base = random_segments(1)
    near = Segments(base.gate + 0.1, base.rest - 0.1)
    far = random_segments(1, seed=5)
    both = Segments(*map(torch.cat, zip(base, Segments(*(2 * p for p in near)), far, strict=True)))
    weights = torch.tensor([3.0, 1.0, 1.0])
    made, labels = spherical_k_means(both, weights, torch.tensor([0, 2]), False)
    assert labels.tolist() == [0, 0, 1]
    flat = torch.cat(both, dim=1)
    unit = flat / flat.norm(dim=1, keepdim=True)
    direction = 3 * unit[0] + unit[1]
    expected = direction / direction.norm() * flat[:2].norm(dim=1).mean()
    torch.testing.assert_close(torch.cat(made, dim=1)[0], expected)
    # gate, up and down share one factor: the product of all three scales with its cube
    assert torch.equal(torch.cat(made, dim=1)[1], flat[2])


def test_opposite_signs_add_up_where_they_are_free_and_cancel_elsewhere() -> None:
    base = random_segments(1)
    pair = Segments(torch.cat([base.gate] * 2), torch.cat([base.rest, -base.rest]))
    free, _ = spherical_k_means(pair, torch.ones(2), torch.tensor([0]), True)
    torch.testing.assert_close(free.rest, base.rest)
    tied, _ = spherical_k_means(pair, torch.ones(2), torch.tensor([0]), False)
    assert tied.rest.abs().max() < 1e-12


def test_heavier_segments_pull_means_to_themselves() -> None:
    some = random_segments(2)
    far = []
    for weight in (1.0, 100.0):
        weights = torch.tensor([1.0, weight])
        made, _ = spherical_k_means(some, weights, torch.tensor([0]), False)
        far.append(float((made.unit().rest - some.unit().rest[1]).norm()))
    assert far[1] < 0.1 * far[0]


# ---- the method


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_alpha_of_one_is_pruning_by_soft_counts_to_the_bit(family: str) -> None:
    teacher = tiny(family)
    found = plan_of(teacher, DERN(alpha=1))
    expected = plan_of(teacher, MomentScore(mean=False, norm_power=0))
    assert found.layers == expected.layers
    assert not found.tensors
    ids = tokens(2, 12)
    students = [apply_plan(teacher, plan) for plan in (found, expected)]
    assert torch.equal(students[0].hidden(ids), students[1].hidden(ids))
    for old, new in zip(teacher.layers, students[0].layers, strict=True):
        assert torch.equal(new.router_rows, old.router_rows[list(found.layers[0].kept)])


def test_fewer_segments_move_the_higher_alpha_is() -> None:
    teacher = tiny("qwen3_moe")
    moved = [added_rows(teacher, plan_of(teacher, DERN(alpha=a))) for a in (0.1, 0.4, 0.5, 0.7)]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > moved[1] > moved[2]


def added_rows(teacher: MoEModel, plan: Plan) -> float:
    """Return the sum of |rows added|, over the layers."""
    total = 0.0
    for layer in teacher.layers:
        rows = plan.tensors.get(f"layers.{layer.index}.router.rows")
        if rows is not None:
            kept = next(p.kept for p in plan.layers if p.layer == layer.index)
            total += float((rows - layer.router_rows[list(kept)]).norm())
    return total


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_copy_of_a_kept_expert_is_absorbed_without_a_trace(family: str) -> None:
    teacher = tiny(family)
    copy_experts(teacher, {2: 0, 4: 1, 6: 3, 7: 5})
    plan = plan_of(teacher, DERN(alpha=0.9))
    student, x = apply_plan(teacher, plan), inputs()
    for old, new, part in zip(teacher.layers, student.layers, plan.layers, strict=True):
        assert part.kept == KEPT
        pooled = old.router_rows[list(KEPT)] + old.router_rows[[2, 4, 6, 7]]
        torch.testing.assert_close(new.router_rows, pooled, atol=1e-6, rtol=1e-6)
        for place, slot in enumerate(KEPT):
            torch.testing.assert_close(
                answers(new, place, x), answers(old, slot, x), atol=1e-5, rtol=1e-5
            )


def test_rows_are_added_by_the_share_of_segments_that_moved() -> None:
    teacher = tiny("qwen3_moe")
    copy_experts(teacher, {2: 0})
    layer = teacher.layers[0]
    stock = expert_parameters(layer.experts)
    for j in range(3):  # three of the copy's channels become those of expert 5
        for rows in (j, 8 + j):
            stock["gate_up_proj"][2, rows] = stock["gate_up_proj"][5, rows]
        stock["down_proj"][2, :, j] = stock["down_proj"][5, :, j]
    plan = plan_of(teacher, DERN(alpha=0.95))
    own = layer.router_rows
    found = plan.tensors["layers.0.router.rows"]
    expected = torch.stack([own[0] + own[2] * 5 / 8, own[1], own[3], own[5] + own[2] * 3 / 8])
    torch.testing.assert_close(found, expected)
    for place, slot in enumerate(KEPT):
        if slot in (1, 3):
            for name, parameter in stock.items():
                assert torch.equal(plan.tensors[f"layers.0.{name}"][place], parameter[slot])


def test_signs_of_channels_do_not_matter_where_they_are_free() -> None:
    x, changed = inputs(), {}
    for signs in (True, False):
        plain, flipped = tiny("qwen3_moe"), tiny("qwen3_moe")
        flip(flipped)
        method = dataclasses.replace(LOOSE, signs=signs)
        pair = [apply_plan(t, plan_of(t, method)).layers[0] for t in (plain, flipped)]
        for slot in range(8):
            torch.testing.assert_close(
                answers(plain.layers[0], slot, x), answers(flipped.layers[0], slot, x)
            )
        changed[signs] = max(
            float((answers(pair[0], i, x) - answers(pair[1], i, x)).abs().max()) for i in range(4)
        )
    assert changed[True] < 1e-5
    assert changed[False] > 1e-3


def test_starts_from_the_largest_segments_recover_from_twins_by_refilled_clusters() -> None:
    """Copies take several seeds there; the clusters that stay empty are given to others."""
    teacher = tiny("qwen3_moe")
    copy_experts(teacher, {2: 0, 4: 1, 6: 3, 7: 5})
    x = inputs()
    student = apply_plan(teacher, plan_of(teacher, DERN(alpha=0.9, init="magnitude")))
    for i, e in enumerate(KEPT):
        torch.testing.assert_close(
            answers(student.layers[0], i, x), answers(teacher.layers[0], e, x), atol=1e-5, rtol=1e-4
        )


def test_a_mean_of_own_segments_can_stand_for_all_of_them() -> None:
    """Two own segments share a cluster that a larger foreign one starts."""
    near = random_segments(3)
    own = Segments(*(part[[0, 0]] + 0.01 * torch.arange(2).view(2, 1) for part in near))
    large = Segments(*(5 * part[[0, 1]] for part in near))
    made = {}
    for scaled in (False, True):
        made[scaled], shares = redistributed(
            Segments(*(part.unsqueeze(0) for part in own)),
            Segments(*(part.unsqueeze(0) for part in large)),
            torch.tensor([0, 0]),
            (torch.tensor([1.0]), torch.tensor([2.0])),
            Absorption("magnitude", True, scaled),
        )
        assert shares.tolist() == [[1.0]]
    [plain], [twice] = (made[key].rest for key in (False, True))
    assert torch.equal(made[True].gate, made[False].gate)
    assert torch.equal(twice[:, :3], plain[:, :3])
    assert torch.equal(twice[:, 3:], plain[:, 3:] * torch.tensor([[2.0], [1.0]]))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_every_expert_ends_with_as_many_segments_as_it_began_with(family: str) -> None:
    teacher = tiny(family)
    plan = plan_of(teacher)
    for part in plan.layers:
        assert part.router == "pooled"
        assert part.bank.stored == 4
        for name, parameter in expert_parameters(teacher.layers[0].experts).items():
            assert plan.tensors[f"layers.{part.layer}.{name}"].shape == (4, *parameter.shape[1:])
    assert plan.lineage["achieved"] == 0.5


def test_no_expert_removed_is_the_model_to_the_bit() -> None:
    teacher = tiny("qwen3_moe")
    view = StatisticSet({0: {Moment(1, 0).name: MASS.double()}}).of(
        teacher.layers[0], LOOSE.requires
    )
    decision = LOOSE.formed(teacher.layers[0], view, tuple(range(8)))
    assert decision.plan.bank.kind == "dense"
    assert not decision.tensors


def test_settings_and_ratios_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"alpha=1.5 is outside \[-1, 1\]"):
        DERN(alpha=1.5)
    with pytest.raises(InputError, match="router=mask: DERN adds rows"):
        DERN(router="mask")
    with pytest.raises(OutOfReach, match=r"allowed ratios: 0 to 0\.75"):
        LOOSE.check(tiny("qwen3_moe").layers, Ratio(0.875), Uniform())
