import dataclasses
import functools
import itertools

import pytest
import torch
from torch import Tensor

from families import tiny, tokens
from rerail.compress.base import extended, make_plan
from rerail.compress.solvers import tucker, whitening
from rerail.errors import InputError, OutOfReach
from rerail.methods.td_moe import TDMoE
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoEModel
from rerail.plan.allocation import PerLayer, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio, dense_numbers, numbers_kept
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect
from rerail.statistics.statistic import StatisticSet

PLAIN = (None, None)
WANTED = tucker.side_statistics(True, True)


def stack(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment(size: int, seed: int = 1, spread: float = 1.0) -> Tensor:
    """Return an ill-conditioned second moment."""
    x = stack(200, size, seed=seed) * torch.logspace(0, spread, size).double()
    return x.mT @ x / 200


def fixed(*ranks: int) -> tucker.Rule:
    """Return a rule that a patched `best_triple` answers with these ranks."""
    return tucker.Rule(ranks, False, True)


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setattr(tucker, "best_triple", lambda shape, ranks, *_: ranks)


def restored(parts: dict[str, Tensor]) -> Tensor:
    core = parts["core"]
    if "expert" in parts:
        core = torch.einsum("ea,abc->ebc", parts["expert"], core)
    return parts["out"] @ core @ parts["in"].mT


def error(w: Tensor, ranks: tuple[int, ...], iterations: int = 0) -> float:
    made = restored(tucker.decomposed(w, PLAIN, fixed(*ranks), iterations)[1])
    return float((made - w).square().sum())


@functools.cache
def measured(family: str = "qwen3_moe") -> tuple[MoEModel, StatisticSet]:
    model, ids = tiny(family), tokens(20, 24)
    return model, collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], WANTED)


def planned(method: TDMoE, family: str = "qwen3_moe", removed: float = 0.5) -> Plan:
    model, held = measured(family)
    return make_plan(method, model.layers, held, Ratio(removed), Uniform())


def losses(model: MoEModel, plan: Plan, held: StatisticSet) -> dict[str, float]:
    """Return the loss of each matrix type of the first layer on the text."""
    old, new = model.layers[0].stack(), apply_plan(model, plan).layers[0].stack()
    sums = held.tensors[0]
    moments = [sums["layer_moment"], sums["layer_moment"], sums["pooled_middle_moment"]]
    gaps = {n: a.double() - b.double() for n, a, b in zip(old._fields, old, new, strict=True)}
    pairs = zip(gaps.items(), moments, strict=True)
    return {n: float((gap @ m @ gap.mT).diagonal(dim1=1, dim2=2).sum()) for (n, gap), m in pairs}


@pytest.mark.parametrize("ranks", [(4, 3, 5), (2, 3, 5), (4, 6, 2), (1, 1, 1)])
def test_the_error_lies_between_the_largest_and_the_sum_of_what_modes_discard(forced, ranks):
    w = stack(4, 6, 9)
    spectra = [tucker.spectrum(w, mode)[0] for mode in range(3)]
    dropped = [float(v[r:].sum()) for v, r in zip(spectra, ranks, strict=True)]
    assert max(dropped) * (1 - 1e-12) <= error(w, ranks) <= sum(dropped) * (1 + 1e-12)


def test_full_ranks_are_exact_and_factors_are_orthonormal(forced):
    w = stack(4, 6, 9)
    assert error(w, (4, 6, 9)) < 1e-18 * float(w.square().sum())
    parts = tucker.decomposed(w, PLAIN, fixed(3, 4, 5))[1]
    for name in ("expert", "out", "in"):
        eye = torch.eye(parts[name].shape[1]).double()
        torch.testing.assert_close(parts[name].mT @ parts[name], eye)


def test_full_expert_rank_is_folded_into_the_core(forced):
    w = stack(4, 6, 9)
    folded = tucker.decomposed(w, PLAIN, fixed(4, 3, 5))[1]
    assert "expert" not in folded
    vectors = [tucker.spectrum(w, mode)[1] for mode in range(3)]
    core = tucker.projected(w, [v[:, :r] for v, r in zip(vectors, (4, 3, 5), strict=True)])
    unfolded = {**folded, "core": core, "expert": vectors[0]}
    torch.testing.assert_close(restored(folded), restored(unfolded), atol=1e-12, rtol=0)


def test_rounds_of_hooi_never_make_the_error_larger(forced):
    w = stack(5, 7, 9)
    errors = [error(w, (3, 3, 3), rounds) for rounds in range(6)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.999 * errors[0]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_one_expert_is_whitened_svd(forced, shape, rank):
    w, c = stack(1, *shape), moment(shape[1])
    sides = (None, tucker.roots(c, 0.5))
    made = restored(tucker.decomposed(w, sides, fixed(1, rank, rank))[1])[0]
    ours = whitening.Moments(c.unsqueeze(0), torch.ones(1), shape[1])
    u, v = whitening.low_rank(w, ours, [rank])
    torch.testing.assert_close(made, u @ v, atol=1e-9, rtol=1e-9)


def test_the_whitened_error_is_the_loss(forced):
    w, c = stack(4, 6, 9), moment(9)
    sides = (None, tucker.roots(c, 0.5))
    gap = restored(tucker.decomposed(w, sides, fixed(4, 3, 4))[1]) - w
    scale = c.diagonal().mean()
    loss = (gap @ c @ gap.mT).diagonal(dim1=1, dim2=2).sum()
    torch.testing.assert_close(loss / scale, (gap @ sides[1].root).square().sum())


@pytest.mark.parametrize("power", [0.0, -0.5])
def test_no_other_power_loses_as_little(forced, power):
    w, c = stack(4, 6, 9), moment(9)

    def loss(power: float) -> float:
        sides = (None, tucker.roots(c, power))
        gap = restored(tucker.decomposed(w, sides, fixed(4, 6, 4))[1]) - w
        return float((gap @ c @ gap.mT).diagonal(dim1=1, dim2=2).sum())

    assert 1.5 * loss(0.5) < loss(power)


def test_roots_do_not_know_the_scale_and_invert_each_other():
    c = moment(7)
    for power in (0.5, -0.5):
        pair, scaled = tucker.roots(c, power), tucker.roots(1e6 * c, power)
        torch.testing.assert_close(pair.root @ pair.inverse, torch.eye(7).double())
        torch.testing.assert_close(pair.root, scaled.root)
    half = tucker.roots(c, 0.5).root
    torch.testing.assert_close(half @ half, c / c.diagonal().mean())


def test_all_outputs_leave_a_shared_subspace_of_inputs(forced):
    w = stack(4, 6, 9)
    made = restored(tucker.decomposed(w, PLAIN, fixed(4, 6, 5))[1])
    gram = sum(e.mT @ e for e in w)
    top = torch.linalg.eigh(gram).eigenvectors[:, -5:]
    torch.testing.assert_close(made, w @ top @ top.mT)


@pytest.mark.parametrize("search", [False, True])
def test_triples_are_the_best_of_all_that_fit(search):
    shape, w = (4, 6, 9), stack(4, 6, 9)
    spectra = [tucker.spectrum(w, mode)[0] for mode in range(3)]
    whole = list(itertools.product(range(1, 5) if search else [4], range(1, 7), range(1, 10)))

    def numbers(r1: int, r2: int, r3: int) -> int:
        return r1 * r2 * r3 + (4 * r1 if r1 < 4 else 0) + 6 * r2 + 9 * r3

    for most in (19, 60, 100, 150, 217):
        fits = [r for r in whole if numbers(*r) <= most]
        near = tucker.best_triple(shape, most, search)
        assert numbers(*near) == max(numbers(*r) for r in fits)
        best = tucker.best_triple(shape, most, search, spectra)
        dropped = {
            r: sum(float(v[n:].sum()) for v, n in zip(spectra, r, strict=True)) for r in fits
        }
        assert dropped[best] == pytest.approx(min(dropped.values()))
        assert numbers(*best) <= most
        r1, r2, r3 = best
        assert most - numbers(*best) < r1 * r2 + 9 or r3 == 9


def test_equal_experts_need_one_slice():
    w = stack(1, 6, 9).expand(4, 6, 9)
    rule = tucker.Rule(1 * 6 * 6 + 4 + 6 * 6 + 9 * 6, search=True, by_energy=True)
    ranks, parts = tucker.decomposed(w, PLAIN, rule)
    assert ranks == (1, 6, 6)
    torch.testing.assert_close(restored(parts), w)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_full_rank_is_the_identity_in_float64(family):
    model, ids = tiny(family), tokens(20, 24)
    model.model.to(torch.float64)
    model.model.set_experts_implementation("eager")
    held = collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], WANTED)
    for method in (TDMoE(), TDMoE(whiten=False), TDMoE(whiten_output=True, power=-0.5)):
        views = [held.of(layer, method.requires) for layer in model.layers]
        decisions = method.decide(model.layers, views, [10**9] * 2)
        student = apply_plan(model, extended(Plan(), decisions))
        with torch.no_grad():
            gap = (student.hidden(tokens()) - model.hidden(tokens())).abs().max()
        assert gap < 1e-9


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_the_budget_is_used_up_and_shared_by_the_three_types(family):
    layer = tiny(family).layers[0]
    for removed in (0.25, 0.5, 0.75):
        plan = planned(TDMoE(), family, removed)
        each = numbers_kept(dense_numbers(layer), removed) - dense_numbers(layer)
        each = each // 3 + layer.stack().up.numel()
        for name, (out, inner) in layer.dims.matrices.items():
            r1, r2, r3 = plan.layers[0].bank.integers[name]
            stored = r1 * r2 * r3 + out * r2 + inner * r3
            assert r1 == 8
            assert each - (r1 * r2 + inner) < stored <= each or r3 == inner


def test_whitening_loses_less_on_the_text_and_more_rank_less_still():
    model, held = measured()
    whitened = losses(model, planned(TDMoE()), held)
    plain = losses(model, planned(TDMoE(whiten=False)), held)
    printed = losses(model, planned(TDMoE(power=-0.5)), held)
    assert sum(whitened.values()) < sum(plain.values()) < sum(printed.values())
    curve = [losses(model, planned(TDMoE(), removed=r), held)["up"] for r in (0.2, 0.5, 0.8)]
    assert curve == sorted(curve)


@pytest.mark.parametrize("outputs", [False, True])
def test_the_scale_of_inputs_and_gradients_changes_nothing(outputs):
    model, held = measured()
    scaled = StatisticSet(
        {
            i: {n: t if n == "count" else 1e4 * t for n, t in tensors.items()}
            for i, tensors in held.tensors.items()
        }
    )
    method = TDMoE(whiten_output=outputs)
    here, there = (
        make_plan(method, model.layers, s, Ratio(0.5), Uniform()) for s in (held, scaled)
    )
    assert here.layers == there.layers
    first, second = (apply_plan(model, plan).layers[0].stack() for plan in (here, there))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_gradients_of_outputs_move_the_plan():
    model, _ = measured()
    here, there = (
        apply_plan(model, planned(method)).layers[0].stack().up
        for method in (TDMoE(), TDMoE(whiten_output=True))
    )
    assert float((here - there).norm() / here.norm()) > 0.05


def test_permuted_experts_permute_the_student():
    model, held = measured()
    other, turn = tiny("qwen3_moe"), [3, 1, 0, 2, 7, 6, 5, 4]
    for layer in other.layers:
        for parameter in expert_parameters(layer.experts).values():
            parameter.data = parameter.data[turn].clone()
    for method in (TDMoE(), TDMoE(expert_rank="search")):
        here = make_plan(method, model.layers, held, Ratio(0.5), Uniform())
        there = make_plan(method, other.layers, held, Ratio(0.5), Uniform())
        assert here.layers == there.layers
        first, second = (apply_plan(m, p).layers[0].stack() for m, p in ((model, here), (other, there)))  # fmt: skip # noqa: E501
        torch.testing.assert_close(second.down, first.down[turn], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_reach_that_is_named_is_the_reach(family):
    layer = tiny(family).layers[0]
    with pytest.raises(OutOfReach, match="ratios from 0 to") as refused:
        TDMoE().sizes(layer, numbers_kept(dense_numbers(layer), 0.98))
    reach = float(str(refused.value).split("ratios from 0 to ")[1].split()[0])
    least = TDMoE().sizes(layer, numbers_kept(dense_numbers(layer), reach - 1e-3))
    assert {m: ranks[0] for m, ranks in least.items()} == {"gate": 8, "up": 8, "down": 8}
    assert all(ranks[1] == 1 or ranks[2] == 1 for ranks in least.values())
    with pytest.raises(OutOfReach):
        TDMoE().sizes(layer, numbers_kept(dense_numbers(layer), reach + 1e-3))


def test_too_little_text_and_uneven_layers():
    model, ids = tiny("qwen3_moe"), tokens(1, 9)
    held = collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], WANTED)
    with pytest.raises(InputError, match="at least 16 calibration tokens, and there were 9"):
        make_plan(TDMoE(), model.layers, held, Ratio(0.5), Uniform())
    plan = make_plan(TDMoE(whiten=False), model.layers, StatisticSet(), Ratio(0.5), Uniform())
    assert all(torch.isfinite(t).all() for t in plan.tensors.values())
    uneven = PerLayer(kept=(2, 6))
    two = make_plan(TDMoE(whiten=False), model.layers, StatisticSet(), Ratio(0.5), uneven)
    small, large = (layer.bank.integers["up"] for layer in two.layers)
    assert small[1] * small[2] < large[1] * large[2]


def test_a_layer_without_gradients_is_not_whitened_on_that_side():
    model, held = measured()
    tensors = {
        i: {n: torch.zeros_like(t) if n.startswith("output") else t for n, t in of_layer.items()}
        for i, of_layer in held.tensors.items()
    }
    there = make_plan(
        TDMoE(whiten_output=True), model.layers, StatisticSet(tensors), Ratio(0.5), Uniform()
    )
    here = planned(TDMoE())
    assert here.layers == there.layers
    for name, tensor in here.tensors.items():
        torch.testing.assert_close(tensor.abs(), there.tensors[name].abs(), atol=1e-4, rtol=1e-3)


def test_the_method_is_its_settings():
    assert TDMoE(whiten=False).requires == ()
    assert len(TDMoE(whiten_output=True).requires) == 6
    assert dataclasses.replace(TDMoE(), choice="distance").requires == TDMoE().requires
    near = planned(TDMoE(choice="distance"))
    assert near.layers[0].bank.integers != planned(TDMoE()).layers[0].bank.integers
