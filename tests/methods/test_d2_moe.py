import functools

import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import extended, make_plan
from rerail.errors import OutOfReach
from rerail.methods.d2_moe import D2MoE, Fisher
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.plan.sizes import Sizes
from rerail.statistics.collect import collect
from rerail.statistics.routed import Count
from rerail.statistics.statistic import StatisticSet

METHODS = [
    D2MoE(),
    D2MoE(weights="fisher_only"),
    D2MoE(weights="frequency", rows="shared"),
    D2MoE(weights="mean", whiten=False),
    D2MoE(base_prune=0.25),
]


@functools.cache
def measured(family: str = "qwen3_moe") -> tuple[MoEModel, StatisticSet]:
    model, ids = tiny(family), tokens(40, 24)
    wanted = [s for m in METHODS for s in m.requires]
    return model, collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], wanted)


def forced(method: D2MoE, model: MoEModel, held: StatisticSet, max_numbers: int = 10**9) -> Plan:
    views = [held.of(layer, method.requires) for layer in model.layers]
    return extended(Plan(), method.decide(model.layers, views, [max_numbers] * 2))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("method", METHODS[:4])
def test_base_and_delta_add_up_to_every_expert_at_full_rank(method: D2MoE, family: str) -> None:
    model, held = measured(family)
    student = apply_plan(model, forced(method, model, held))
    for old, new in zip(model.layers, student.layers, strict=True):
        for a, b in zip(old.stack(), new.stack(), strict=True):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_base_is_the_weighted_mean_of_the_experts(family: str) -> None:
    model, held = measured(family)
    layer, n = model.layers[0], 2 * 8 * 16
    f = held.tensors[0]["count"].double()
    fisher = held.tensors[0]["fisher"].double()
    stock = expert_parameters(layer.experts)
    for method, weight in (
        (D2MoE(), f.unsqueeze(1) * fisher),
        (D2MoE(weights="fisher_only"), fisher),
        (D2MoE(weights="frequency"), f.unsqueeze(1).expand_as(fisher)),
        (D2MoE(weights="mean"), torch.ones_like(fisher)),
    ):
        base = forced(method, model, held).of_layer(0)
        found = layer.layout.pack(
            type(layer.stack())(*(base[f"{m}.base"] for m in ("gate", "up", "down")))
        )
        for name, part in (("gate_up_proj", weight[:, :n]), ("down_proj", weight[:, n:])):
            w = stock[name].double()
            part = part.reshape(w.shape)
            mass = part.sum(dim=0)
            mean = torch.where(mass > 0, (part * w).sum(dim=0) / mass, w.mean(dim=0))
            torch.testing.assert_close(found[name], mean.float(), atol=1e-6, rtol=1e-5)


def test_without_fisher_information_the_base_is_the_mean() -> None:
    model, held = measured()
    silent = {i: t | {"fisher": 0 * t["fisher"]} for i, t in held.tensors.items()}
    plan = forced(D2MoE(), model, StatisticSet(silent))
    base = plan.of_layer(0)["down.base"]
    torch.testing.assert_close(base, model.layers[0].stack().down.mean(dim=0))


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2]])
def test_identical_experts_leave_nothing_to_the_deltas(method: D2MoE) -> None:
    model, held = tiny("qwen3_moe"), measured()[1]
    for layer in model.layers:
        for parameter in expert_parameters(layer.experts).values():
            parameter.data = parameter.data[:1].repeat(8, 1, 1)
    for removed in (0.3, 0.65):
        plan = make_plan(method, model.layers, held, Ratio(removed), Uniform())
        new = apply_plan(model, plan).layers[0].stack()
        for a, b in zip(model.layers[0].stack(), new, strict=True):
            torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prune", [0.0, 0.25])
def test_a_delta_loses_what_its_spectrum_drops(prune: float) -> None:
    model, held = measured()
    method = D2MoE(shrink=0.0, ridge=0.0, base_prune=prune)
    plan = make_plan(method, model.layers, held, Ratio(0.5), Uniform())
    new, base = apply_plan(model, plan).layers[0].stack(), plan.of_layer(0)["down.base"].double()
    integers = plan.layers[0].bank.integers
    kept = list(integers.get("channels", range(8)))
    moment = held.tensors[0]["middle_moment_g0"][:, kept][:, :, kept]
    for e, rank in enumerate(integers["down"]):
        weight = model.layers[0].stack().down[e].double()[:, kept]
        gap, delta = weight - new.down[e].double()[:, kept], weight - base
        values = torch.linalg.svdvals(delta @ torch.linalg.cholesky(moment[e])).square()
        found = (gap @ moment[e] @ gap.T).trace()
        torch.testing.assert_close(found, values[rank:].sum(), rtol=1e-3, atol=1e-5)


def test_dropping_channels_that_never_speak_loses_nothing_but_numbers() -> None:
    model = tiny("qwen3_moe")
    for layer in model.layers:
        experts = expert_parameters(layer.experts)
        experts["gate_up_proj"].data[:, [2, 5]] = 0
    ids = tokens(40, 24)
    method = D2MoE(weights="frequency", base_prune=0.25)
    held = collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], method.requires)
    plan = forced(method, model, held)
    kept = (0, 1, 3, 4, 6, 7)
    assert all(part.bank.integers["channels"] == kept for part in plan.layers)
    assert plan.of_layer(0)["gate.base"].shape == (6, 16)
    with torch.no_grad():
        student = apply_plan(model, plan)
        torch.testing.assert_close(
            student.hidden(ids[:2]), model.hidden(ids[:2]), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_channels_are_ranked_by_what_they_add(family: str) -> None:
    model, held = measured(family)
    plan = forced(D2MoE(base_prune=0.4), model, held)
    f = held.tensors[0]["count"].double()
    energy = held.tensors[0]["middle_moment_g0"].diagonal(dim1=1, dim2=2)
    weight = model.layers[0].stack().down.double().square().sum(dim=1)
    score = (f.unsqueeze(1) * energy * weight).sum(dim=0)
    kept = plan.layers[0].bank.integers["channels"]
    assert set(kept) == set(score.argsort(descending=True)[:5].tolist())
    out = apply_plan(model, plan).layers[0].stack()
    dropped = [j for j in range(8) if j not in kept]
    assert not out.gate[:, dropped].any()
    assert not out.down[:, :, dropped].any()
    assert out.down[:, :, list(kept)].abs().amin() > 0


def test_dropped_channels_pay_for_higher_ranks_at_the_same_size() -> None:
    model, held = measured()
    found = {}
    for method in (D2MoE(), D2MoE(base_prune=0.25)):
        plan = make_plan(method, model.layers, held, Ratio(0.5), Uniform())
        found[method.base_prune] = sum(
            sum(plan.layers[0].bank.integers[n]) for n in ("gate", "up", "down")
        )
        sizes = Sizes.predicted(model, plan, 2).removed_of_experts(Sizes.of(model, 2))
        assert 0.5 <= sizes < 0.52
    assert found[0.25] > found[0.0]


@pytest.mark.parametrize("method", METHODS)
def test_never_routed_experts_stay_finite(method: D2MoE) -> None:
    model, held = measured()
    tensors = {i: {n: t.clone() for n, t in held.tensors[i].items()} for i in held.tensors}
    for t in tensors.values():
        for tensor in t.values():
            tensor[5] = 0
    plan = make_plan(method, model.layers, StatisticSet(tensors), Ratio(0.5), Uniform())
    assert all(torch.isfinite(t).all() for t in plan.tensors.values())


def test_only_what_the_options_need_is_measured() -> None:
    assert Fisher() in D2MoE().requires
    assert D2MoE(weights="mean", whiten=False).requires == ()
    assert D2MoE(weights="frequency", whiten=False).requires == (Count(),)


def test_a_base_that_is_too_large_is_refused() -> None:
    with pytest.raises(OutOfReach, match=r"ratios from 0 to 0\.6875 can be reached"):
        D2MoE().check(tiny("qwen3_moe").layers, Ratio(0.9), Uniform())
