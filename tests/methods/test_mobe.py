import dataclasses

import pytest
import torch
from torch.nn import functional as F

from families import CONFIGS, tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.solvers.bases import start
from rerail.errors import OutOfReach
from rerail.experts.basis import BasisExperts, mixed
from rerail.methods.mobe import MoBE
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer
from rerail.plan.allocation import GlobalScore, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio, dense_numbers, numbers_kept
from rerail.statistics.statistic import StatisticSet

PAPER = MoBE(matrices="gate+up", rank="full", steps=5)


def stack(experts: int = 8, rows: int = 6, columns: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(seed))


def error(method: MoBE, target: torch.Tensor, bases: int, rank: int) -> float:
    a, alpha, b = method.fit(target, bases, rank)
    made = mixed(a, alpha, b, method.activation)
    return float((made - target).square().sum() / target.square().sum())


def test_the_best_step_is_no_worse_than_the_start_and_more_steps_do_not_hurt() -> None:
    errors = [error(MoBE(steps=steps, patience=99), stack(), 2, 4) for steps in (0, 5, 80, 400)]
    assert errors[1] <= errors[0]
    assert errors[3] <= errors[2] < errors[0]
    assert errors[3] < 0.55


def test_weights_lie_on_the_simplex_and_the_start_is_not_one_hot() -> None:
    for steps in (0, 30):
        alpha = MoBE(steps=steps).fit(stack(), 2, 4)[1]
        assert alpha.shape == (8, 2)
        assert (alpha > 0).all()
        assert (alpha < 1).all()
        torch.testing.assert_close(alpha.sum(dim=1), torch.ones(8))


def test_the_scale_is_folded_into_a() -> None:
    small = MoBE(steps=30).fit(stack(), 2, 4)
    raw = stack()
    a, alpha, b = MoBE(steps=0).fit(raw * 7, 2, 4)
    first = start(raw * 7, 2, 4)
    torch.testing.assert_close(a, first[0] * (raw * 7).std())
    torch.testing.assert_close(b, first[2])
    torch.testing.assert_close(alpha, F.softmax(first[1], -1))
    assert small[0].std() > 0


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_one_basis_an_expert_of_full_rank_starts_exact(shape: tuple[int, int]) -> None:
    target = stack(8, *shape).double()
    a, w, b = start(target, 8, 6)
    torch.testing.assert_close(mixed(a, w, b, "identity"), target)


def test_the_start_is_the_best_low_rank_of_each_block() -> None:
    target = stack().double()
    a, w, b = start(target, 2, 4)
    assert w.tolist() == [[1, 0]] * 4 + [[0, 1]] * 4
    for block in (0, 1):
        rows = slice(4 * block, 4 * block + 4)
        flat = target[rows].reshape(24, 10)
        found = (a[rows] @ b[block]).reshape(24, 10)
        dropped = torch.linalg.svdvals(flat)[4:].square().sum()
        torch.testing.assert_close((flat - found).square().sum(), dropped)
    assert (b.gather(-1, b.abs().argmax(-1, keepdim=True)) > 0).all()


def test_down_is_factorised_as_its_transpose() -> None:
    layer, method = tiny("qwen3_moe").layers[0], MoBE(steps=10)
    sizes = {"bases": 2, "rank": 4}
    found = method.factor(layer, {}, sizes)
    a, alpha, b = method.fit(layer.stack().down.mT, 2, 4)
    expected = {"down.A": a, "down.alpha": alpha, "down.B": b}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found["down.B"].shape == (2, 4, layer.hidden_size)


def stored(method: MoBE, layer: MoELayer, sizes: dict[str, int]) -> int:
    return sum(BasisExperts.predicted(method.spec(layer, sizes), layer.index, layer.dims).values())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("removed", [0.1, 0.2, 0.35, 0.5, 0.7])
@pytest.mark.parametrize("method", [MoBE(), MoBE(bases=4), MoBE(matrices="gate+up"), PAPER])
def test_sizes_use_the_budget_to_the_last_quantum_or_say_what_can_be_reached(
    method: MoBE, removed: float, family: str
) -> None:
    layer = tiny(family).layers[0]
    budget, dense = numbers_kept(dense_numbers(layer), removed), layer.expert_size * 8
    try:
        sizes = method.sizes(layer, budget)
    except OutOfReach as refused:
        reach = float(str(refused).split("ratios from 0 to ")[1].split()[0])
        assert reach < removed + 1e-4
        return
    assert stored(method, layer, sizes) <= budget <= dense
    name = "bases" if method.rank == "full" else "rank"
    more = [n for n in (1, 2, 4, 8) if n > sizes[name]] if name == "bases" else [sizes[name] + 1]
    if name == "rank" and sizes["rank"] == min(8 // sizes["bases"] * layer.intermediate_size, 16):
        return
    assert not more or stored(method, layer, {**sizes, name: more[0]}) > budget


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_the_reach_that_is_named_is_the_reach(family: str) -> None:
    layer = tiny(family).layers[0]
    for method in (MoBE(), MoBE(matrices="gate+up"), MoBE(bases=2)):
        with pytest.raises(OutOfReach, match="can be reached") as refused:
            method.sizes(layer, numbers_kept(dense_numbers(layer), 0.97))
        reach = float(str(refused.value).split("ratios from 0 to ")[1].split()[0])
        assert method.sizes(layer, numbers_kept(dense_numbers(layer), reach - 1e-3))["rank"] == 1
        with pytest.raises(OutOfReach):
            method.sizes(layer, numbers_kept(dense_numbers(layer), reach + 1e-3))


def test_the_papers_form_cannot_go_below_seven_twelfths() -> None:
    layer = tiny("qwen3_moe", moe_intermediate_size=4).layers[0]
    with pytest.raises(OutOfReach, match="can be reached") as refused:
        PAPER.sizes(layer, numbers_kept(dense_numbers(layer), 0.5))
    reach = float(str(refused.value).split("ratios from 0 to ")[1].split()[0])
    assert reach < 5 / 12


def test_bases_that_do_not_divide_the_experts_are_refused() -> None:
    with pytest.raises(OutOfReach, match=r"bases=3 cannot .* bases must divide 8"):
        MoBE(bases=3).sizes(tiny("qwen3_moe").layers[0], 10**9)


def test_a_rank_never_exceeds_what_a_block_has() -> None:
    layer = tiny("qwen3_moe", moe_intermediate_size=2).layers[0]
    assert MoBE(bases=8).sizes(layer, 10**9) == {"bases": 8, "rank": 2}
    assert MoBE(bases=1).sizes(layer, 10**9) == {"bases": 1, "rank": 16}


def test_a_number_of_experts_that_four_does_not_divide_still_has_bases() -> None:
    layer = tiny("qwen3_moe", num_experts=14).layers[0]
    assert MoBE().sizes(layer, numbers_kept(dense_numbers(layer), 0.4))["bases"] == 2


def test_it_needs_no_data_and_no_random_numbers() -> None:
    teacher, method = tiny("qwen3_moe"), MoBE(steps=20)
    assert method.requires == ()
    plans = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        plans.append(make_plan(method, teacher.layers, StatisticSet(), Ratio(0.5), Uniform()))
    assert plans[0].tensors.keys() == plans[1].tensors.keys()
    assert all(torch.equal(t, plans[1].tensors[n]) for n, t in plans[0].tensors.items())
    assert not any(t.requires_grad for t in plans[0].tensors.values())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_routers_and_untouched_matrices_stay_the_teachers(family: str) -> None:
    teacher = tiny(family)
    plan = make_plan(PAPER, teacher.layers, StatisticSet(), Ratio(0.1), Uniform())
    student = apply_plan(teacher, plan)
    for old, new in zip(teacher.layers, student.layers, strict=True):
        assert new.router_rows is old.router_rows
        shell = expert_parameters(new.experts.shell)
        for name, parameter in expert_parameters(old.experts).items():
            assert (shell.get(name) is parameter) is (name != "gate_up_proj")


def test_a_dead_layer_stays_finite() -> None:
    a, alpha, b = MoBE(steps=10).fit(torch.zeros(8, 6, 10), 2, 4)
    assert all(torch.isfinite(t).all() for t in (a, alpha, b))
    assert mixed(a, alpha, b, "silu").abs().max() < 1e-6


def test_only_uniform_allocation_makes_sense() -> None:
    with pytest.raises(OutOfReach, match="MoBE keeps them all; use allocation=uniform"):
        MoBE().check(tiny("qwen3_moe").layers, Ratio(0.5), GlobalScore())


def test_a_student_is_closer_the_more_it_may_store() -> None:
    teacher, ids = tiny("qwen3_moe"), tokens()
    gaps = []
    for removed in (0.2, 0.8):
        method = dataclasses.replace(MoBE(), steps=60)
        plan = make_plan(method, teacher.layers, StatisticSet(), Ratio(removed), Uniform())
        with torch.no_grad():
            student = apply_plan(teacher, plan)
            gaps.append(float((student.hidden(ids) - teacher.hidden(ids)).norm()))
    assert gaps == sorted(gaps)
