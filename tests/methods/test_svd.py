import dataclasses
import functools

import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import extended, make_plan
from rerail.errors import InputError
from rerail.methods.svd import WhitenedSVD
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect
from rerail.statistics.moments import InputMoment, MiddleMoment
from rerail.statistics.routed import Count
from rerail.statistics.statistic import StatisticSet

EXACT = WhitenedSVD(shrink=0.0, ridge=0.0)
WANTED = (Count(), InputMoment(), MiddleMoment())


@functools.cache
def measured(family: str, count: int = 40, **changes: int) -> tuple[MoEModel, StatisticSet]:
    model, ids = tiny(family, **changes), tokens(count, 24)
    return model, collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], WANTED)


def planned(method: WhitenedSVD, family: str, removed: float = 0.5) -> tuple[MoEModel, Plan]:
    model, held = measured(family)
    return model, make_plan(method, model.layers, held, Ratio(removed), Uniform())


def losses(model: MoEModel, student: MoEModel, held: StatisticSet) -> dict[str, torch.Tensor]:
    """Return the loss of every matrix of the first layer on the text: (E,) by name."""
    old, new = model.layers[0].stack(), student.layers[0].stack()
    sums = held.tensors[0]
    moments = [sums["input_moment"], sums["input_moment"], sums["middle_moment_g0"]]
    found = {}
    for name, a, b, moment in zip(old._fields, old, new, moments, strict=True):
        gap = a.double() - b.double()
        found[name] = (gap @ moment @ gap.mT).diagonal(dim1=1, dim2=2).sum(dim=1)
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_every_expert_loses_what_its_spectrum_drops(family: str) -> None:
    model, plan = planned(EXACT, family)
    held = measured(family)[1]
    found = losses(model, apply_plan(model, plan), held)
    ranks = plan.layers[0].bank.integers
    for name, weight in model.layers[0].stack()._asdict().items():
        moment = held.tensors[0]["middle_moment_g0" if name == "down" else "input_moment"]
        values = torch.linalg.eigvalsh(weight.double() @ moment @ weight.double().mT).flip(1)
        for e in range(8):
            dropped = values[e, ranks[name][e] :].sum()
            torch.testing.assert_close(found[name][e], dropped, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_whitening_loses_less_on_the_text_than_plain_svd(family: str) -> None:
    model, held = measured(family)
    whitened, plain = (
        losses(model, apply_plan(model, planned(method, family)[1]), held)
        for method in (EXACT, WhitenedSVD(whiten=False))
    )
    for name in whitened:
        assert (whitened[name] <= plain[name] * (1 + 1e-4)).all()
        assert whitened[name].sum() < 0.95 * plain[name].sum()


def test_plain_svd_reads_no_text() -> None:
    layers = tiny("qwen3_moe").layers
    method = WhitenedSVD(whiten=False)
    assert method.requires == ()
    plan = make_plan(method, layers, StatisticSet(), Ratio(0.5), Uniform())
    rank = plan.layers[0].bank.integers["up"][3]
    start = sum(plan.layers[0].bank.integers["up"][:3])
    u, v = (plan.tensors[f"layers.0.up.{part}"] for part in ("U", "V"))
    made = u[:, start : start + rank] @ v[start : start + rank]
    a, s, b = torch.linalg.svd(layers[0].stack().up[3], full_matrices=False)
    torch.testing.assert_close(made, a[:, :rank] * s[:rank] @ b[:rank], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_full_rank_is_the_identity(family: str, dtype: torch.dtype) -> None:
    model = tiny(family)
    model.model.to(dtype)
    model.model.set_experts_implementation("eager")
    ids = tokens(40, 24)
    held = collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], WANTED)
    views = [held.of(layer, WANTED) for layer in model.layers]
    method = WhitenedSVD()
    decisions = method.decide(model.layers, views, [10**9] * 2)
    student = apply_plan(model, extended(Plan(), decisions))
    with torch.no_grad():
        gap = (student.hidden(tokens()) - model.hidden(tokens())).abs().max()
    assert gap < (1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("method", [WhitenedSVD(), WhitenedSVD(spread="spectrum")])
def test_routers_and_biases_stay_the_teachers(method: WhitenedSVD) -> None:
    model, plan = planned(method, "gpt_oss")
    student = apply_plan(model, plan)
    for old, new in zip(model.layers, student.layers, strict=True):
        assert new.router_rows is old.router_rows
        assert new.num_experts == 8
        shell = expert_parameters(new.experts.shell)
        for name, parameter in expert_parameters(old.experts).items():
            assert (shell.get(name) is parameter) is name.endswith("bias")


def test_spectra_move_ranks_towards_the_richer_matrices() -> None:
    held = measured("qwen3_moe")[1]
    poor, layer = tiny("qwen3_moe"), 0
    experts = expert_parameters(poor.layers[layer].experts)
    experts["down_proj"].data[3] = torch.outer(torch.randn(16), torch.randn(8))
    even = make_plan(WhitenedSVD(), poor.layers, held, Ratio(0.5), Uniform()).layers[layer].bank
    made = make_plan(WhitenedSVD(spread="spectrum"), poor.layers, held, Ratio(0.5), Uniform())
    ranks = made.layers[layer].bank.integers
    assert ranks["down"][3] < min(r for e, r in enumerate(ranks["down"]) if e != 3)
    totals = [sum(map(sum, b.values())) for b in (even.integers, ranks)]
    assert totals[0] == totals[1]
    assert ranks["gate"] != even.integers["gate"] or ranks["down"] != even.integers["down"]


def test_an_expert_that_is_never_routed_to_takes_the_layers_moment() -> None:
    model, held = measured("qwen3_moe")
    tensors = {i: dict(t) for i, t in held.tensors.items()}
    for t in tensors.values():
        t["count"] = t["count"].clone()
        t["count"][5] = 0
        for name in ("input_moment", "middle_moment_g0"):
            t[name] = t[name].clone()
            t[name][5] = 0
    plan = make_plan(EXACT, model.layers, StatisticSet(tensors), Ratio(0.5), Uniform())
    assert all(torch.isfinite(t).all() for t in plan.tensors.values())
    ranks = plan.layers[0].bank.integers["up"]
    rows = slice(sum(ranks[:5]), sum(ranks[:6]))
    u = plan.tensors["layers.0.up.U"][:, rows].double()
    weight, moment = model.layers[0].stack().up[5].double(), tensors[0]["input_moment"].sum(dim=0)
    top = torch.linalg.eigh(weight @ moment @ weight.mT).eigenvectors[:, -ranks[5] :]
    torch.testing.assert_close(u @ u.mT, top @ top.mT, atol=1e-5, rtol=1e-4)


def test_too_little_text_is_refused_unless_shrinkage_covers_it() -> None:
    model = tiny("qwen3_moe")
    for count, length in ((1, 9), (3, 20)):
        ids = tokens(count, length)
        held = collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], WANTED)
        views = (model.layers, held, Ratio(0.5), Uniform())
        if count == 1:
            with pytest.raises(
                InputError, match="at least 16 calibration tokens, and there were 9"
            ):
                make_plan(WhitenedSVD(), *views)
            continue
        with pytest.raises(InputError, match="at least 16 tokens at each expert"):
            make_plan(EXACT, *views)
        plan = make_plan(WhitenedSVD(), *views)
        assert all(torch.isfinite(t).all() for t in plan.tensors.values())


def test_more_rank_is_closer_and_permuted_experts_permute_the_plan() -> None:
    model, held = measured("qwen3_moe")
    found = []
    for removed in (0.2, 0.5, 0.8):
        plan = planned(EXACT, "qwen3_moe", removed)[1]
        found.append(float(losses(model, apply_plan(model, plan), held)["up"].sum()))
    assert found == sorted(found)
    other, turn = tiny("qwen3_moe"), [3, 1, 0, 2, 7, 6, 5, 4]
    for layer in other.layers:
        for parameter in expert_parameters(layer.experts).values():
            parameter.data = parameter.data[turn].clone()
    turned = StatisticSet(
        {i: {n: t[turn] for n, t in tensors.items()} for i, tensors in held.tensors.items()}
    )
    method = dataclasses.replace(EXACT, spread="spectrum")
    here = make_plan(method, model.layers, held, Ratio(0.5), Uniform())
    there = make_plan(method, other.layers, turned, Ratio(0.5), Uniform())
    first, second = (apply_plan(m, p).layers[0].stack() for m, p in ((model, here), (other, there)))
    torch.testing.assert_close(second.down, first.down[turn], atol=1e-5, rtol=1e-4)


def test_router_rows_get_gradients_through_the_factors() -> None:
    model, plan = planned(WhitenedSVD(), "qwen3_moe")
    student = apply_plan(model, plan)
    rows = [layer.router_rows for layer in student.layers]
    try:
        for parameter in rows:
            parameter.requires_grad_(True)
        student.hidden(tokens()).square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in rows)
        others = [p for p in student.model.parameters() if all(p is not r for r in rows)]
        assert all(p.grad is None for p in others)
    finally:
        for parameter in rows:
            parameter.requires_grad_(False)
            parameter.grad = None
