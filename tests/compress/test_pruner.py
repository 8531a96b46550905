import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.guard import MaxOutput, super_experts
from rerail.compress.router_rows import best_slots
from rerail.compress.templates import pruner
from rerail.errors import OutOfReach
from rerail.methods.reap import MomentScore
from rerail.plan.allocation import GlobalScore, PerLayer, Uniform
from rerail.plan.budget import Ratio
from rerail.statistics.collect import collect
from rerail.statistics.routed import Count, Moment
from rerail.statistics.statistic import StatisticSet

SCORES = torch.tensor([5.0, 4.0, 3.0, 9.0, 2.0, 1.0, 0.5, 0.2])


@pytest.mark.parametrize(
    ("count", "groups", "each", "kept"),
    [
        (3, 1, 0, (0, 1, 3)),
        (8, 1, 2, (0, 1, 2, 3, 4, 5, 6, 7)),
        (4, 2, 2, (0, 3, 4, 5)),
        (5, 2, 2, (0, 1, 3, 4, 5)),
        (4, 4, 1, (0, 3, 4, 6)),
    ],
)
def test_the_best_are_kept_with_enough_in_every_group(
    count: int, groups: int, each: int, kept: tuple[int, ...]
) -> None:
    assert best_slots(SCORES, count, groups, each) == kept


def test_ties_keep_the_lower_slot() -> None:
    assert best_slots(torch.ones(8), 3) == (0, 1, 2)


def scored(scores: torch.Tensor, layers: int = 2) -> StatisticSet:
    held = {Moment(1, 1).name: scores, Count().name: torch.ones(8, dtype=torch.int64)}
    return StatisticSet(dict.fromkeys(range(layers), held))


def test_a_sliced_grouped_router_keeps_equal_groups() -> None:
    layers = tiny("deepseek_v3").layers
    plan = make_plan(MomentScore(), layers, scored(SCORES), Ratio(0.5), Uniform())
    assert plan.layers[0].kept == (0, 3, 4, 5)


def test_a_masked_grouped_router_keeps_two_in_each_group_and_the_best_of_all() -> None:
    layers, method = tiny("deepseek_v3").layers, MomentScore(router="mask")
    plan = make_plan(method, layers, scored(SCORES), Ratio(0.375), Uniform())
    assert plan.layers[0].kept == (0, 1, 3, 4, 5)
    assert len(plan.layers[0].slots) == 8


@pytest.mark.parametrize(
    ("method", "allocation", "removed", "sentence"),
    [
        (MomentScore(), Uniform(), 0.25 / 2, "2 groups that must stay equal.*router=mask"),
        (MomentScore(), GlobalScore(), 0.5, "2 groups that must stay equal.*router=mask"),
        (MomentScore(), PerLayer((4, 5)), 0.5, "2 groups that must stay equal.*router=mask"),
        (MomentScore(), Uniform(), 0.75, r"leaves 2 of 8 .*at least 4.*ratios: 0 to 0.5"),
        (MomentScore(router="mask"), Uniform(), 0.75, r"at least 4 are needed.*ratios: 0 to 0.5"),
    ],
)
def test_grouped_routers_that_would_break_are_refused_before_any_statistic(
    method: MomentScore, allocation: object, removed: float, sentence: str
) -> None:
    with pytest.raises(OutOfReach, match=sentence):
        method.check(tiny("deepseek_v3").layers, Ratio(removed), allocation)


def test_fewer_experts_than_top_k_are_refused() -> None:
    with pytest.raises(OutOfReach, match=r"at least 2 are needed.*allowed ratios: 0 to 0.75"):
        MomentScore().check(tiny("qwen3_moe").layers, Ratio(0.875), Uniform())


def test_masks_may_be_allocated_globally_on_grouped_routers() -> None:
    layers, method = tiny("deepseek_v3").layers, MomentScore(router="mask")
    plan = make_plan(method, layers, scored(SCORES), Ratio(0.375), GlobalScore())
    assert sum(len(part.kept) for part in plan.layers) == 10


def test_a_plan_is_equivariant_under_permutation_of_the_experts() -> None:
    plain, order = tiny("qwen3_moe"), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    moved, method = tiny("qwen3_moe"), MomentScore()
    for layer in moved.layers:
        layer.router_rows.data = layer.router_rows.data[order]
        for parameter in layer.experts.parameters():
            parameter.data = parameter.data[order]
    ids = tokens(8, 16)
    batches = [(ids, torch.ones_like(ids, dtype=torch.bool))]
    torch.testing.assert_close(moved.hidden(ids), plain.hidden(ids), atol=1e-5, rtol=1e-5)
    kept = []
    for model in (plain, moved):
        filled = collect(model, batches, method.requires)
        plan = make_plan(method, model.layers, filled, Ratio(0.5), Uniform())
        kept.append([set(part.kept) for part in plan.layers])
    assert kept[0] == [{int(order[slot]) for slot in part} for part in kept[1]]


def largest(layers: int = 4, **planted: float) -> list[torch.Tensor]:
    """Return the largest outputs (E,) of some layers, all 1 but the planted `l<layer>_<slot>`."""
    found = [torch.ones(8, dtype=torch.float64) for _ in range(layers)]
    for place, value in planted.items():
        layer, slot = place.removeprefix("l").split("_")
        found[int(layer)][int(slot)] = value
    return found


@pytest.mark.parametrize(
    ("guard", "planted", "guarded"),
    [
        ("super", {"l0_3": 1e3}, [{3}, set(), set(), set()]),
        ("super", {"l3_3": 1e3}, [set(), set(), set(), set()]),
        ("outliers", {"l3_3": 1e3}, [set(), set(), set(), {3}]),
        ("outliers", {}, [set(), set(), set(), set()]),
    ],
)
def test_super_experts_stand_out_of_all_layers_in_the_first_three_quarters(
    guard: str, planted: dict[str, float], guarded: list[set[int]]
) -> None:
    assert super_experts(largest(**planted), guard) == guarded


def test_both_thresholds_must_be_passed() -> None:
    many = [torch.ones(200, dtype=torch.float64) for _ in range(4)]
    many[0][:3] = torch.tensor([1000.0, 500.0, 99.0])
    assert super_experts(many, "outliers")[0] == {0, 1}  # 99 is above P99.5, not above a tenth
    many[0][:10] = 1000 + torch.arange(10.0)
    assert super_experts(many, "outliers")[0] == {6, 7, 8, 9}  # a half percent of 800


def guarded_set(slot: int, layers: int = 2) -> StatisticSet:
    held = {**scored(SCORES).tensors[0], MaxOutput().name: torch.ones(8, dtype=torch.float64)}
    first = held | {MaxOutput().name: largest(1, **{f"l0_{slot}": 1e3})[0]}
    return StatisticSet({i: first if i == 0 else held for i in range(layers)})


@pytest.mark.parametrize("slot", range(8))
@pytest.mark.parametrize("allocation", [Uniform(), GlobalScore()])
def test_a_guarded_expert_is_never_dropped(slot: int, allocation: object) -> None:
    layers = tiny("qwen3_moe").layers
    method = MomentScore(guard="outliers")
    plan = make_plan(method, layers, guarded_set(slot), Ratio(0.75), allocation)
    assert slot in plan.layers[0].kept
    assert sum(len(part.kept) for part in plan.layers) == 4
    assert (
        plan.layers[1].kept
        == make_plan(MomentScore(), layers, guarded_set(slot), Ratio(0.75), Uniform())
        .layers[1]
        .kept
    )


def test_a_planted_activation_guards_through_the_pass_whatever_its_sign() -> None:
    model, ids = tiny("qwen3_moe"), tokens(8, 16)
    batches = [(ids, torch.ones_like(ids, dtype=torch.bool))]
    method = MomentScore(mean=False, gate_power=0, norm_power=0, guard="outliers")
    count = collect(model, batches, (Count(),)).tensors[1][Count().name]
    rare = int(torch.where(count > 0, count, 10**6).argmin())
    model.layers[1].experts.down_proj.data[rare, 0] = 0
    model.layers[1].experts.down_proj.data[rare, 1] *= -1e4
    filled = collect(model, batches, method.requires)
    plan = make_plan(method, model.layers, filled, Ratio(0.75), Uniform())
    assert rare in plan.layers[1].kept
    plain = MomentScore(mean=False, gate_power=0, norm_power=0)
    assert rare not in make_plan(plain, model.layers, filled, Ratio(0.75), Uniform()).layers[1].kept


def test_more_guarded_experts_than_stay_are_refused_by_name() -> None:
    layers, filled = tiny("deepseek_v3").layers, guarded_set(0)
    method = MomentScore(guard="outliers")

    def guarded(*_: object) -> list[frozenset[int]]:
        return [frozenset({0, 1, 2}), frozenset()]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pruner, "guarded_slots", guarded)
        with pytest.raises(OutOfReach, match=r"protects \[0, 1, 2\], so at least 5.*guard=none"):
            make_plan(method, layers, filled, Ratio(0.5), Uniform())


def test_a_guard_declares_what_it_reads_and_plans_all_layers_together() -> None:
    layers = tiny("qwen3_moe").layers
    assert MomentScore().scopes(layers) == [[0], [1]]
    assert MomentScore(guard="super").scopes(layers) == [[0, 1]]
    assert set(MomentScore(guard="super").requires) == {Moment(1, 1), Count(), MaxOutput()}
