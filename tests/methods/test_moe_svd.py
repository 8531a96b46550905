import functools

import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import extended, make_plan
from rerail.compress.solvers.whitening import principal
from rerail.errors import OutOfReach
from rerail.methods.moe_svd import MoESVD, OutlierShare, sensitivity
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.plan.sizes import Sizes
from rerail.statistics.collect import collect
from rerail.statistics.statistic import StatisticSet

WANTED = MoESVD(dense_layers=1).requires


@functools.cache
def measured(family: str = "qwen3_moe", layers: int = 2) -> tuple[MoEModel, StatisticSet]:
    model, ids = tiny(family, num_hidden_layers=layers), tokens(40, 24)
    return model, collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], WANTED)


def planned(method: MoESVD, removed: float = 0.5, family: str = "qwen3_moe") -> Plan:
    model, held = measured(family)
    return make_plan(method, model.layers, held, Ratio(removed), Uniform())


def lost(method: MoESVD, removed: float = 0.5) -> dict[str, float]:
    """Return the loss on the text, added up over the experts of the first layer."""
    model, held = measured()
    plan = planned(method, removed)
    old, new = model.layers[0].stack(), apply_plan(model, plan).layers[0].stack()
    found = {}
    for name, a, b in zip(old._fields, old, new, strict=True):
        gap = a.double() - b.double()
        moment = held.tensors[0]["middle_moment_g0" if name == "down" else "input_moment"]
        found[name] = float((gap @ moment @ gap.mT).diagonal(dim1=1, dim2=2).sum())
    return found


def test_the_published_form_is_the_most_used_experts_rows_and_ones_own_columns() -> None:
    model, held = measured()
    method = MoESVD(shrink=0.0, ridge=0.0)
    plan, count = planned(method), held.tensors[0]["count"]
    rank, best = plan.layers[0].bank.integers["gate"], int(count.argmax())
    u, v = (plan.tensors[f"layers.0.gate.{part}"].double() for part in ("U", "V"))
    for e in (best, (best + 1) % 8):
        moment = held.tensors[0]["input_moment"][e] / count[e]
        root = torch.linalg.cholesky(moment)
        weight = model.layers[0].stack().gate[e].double()
        p, s, qt = torch.linalg.svd(weight @ root, full_matrices=False)
        found = u[e] / torch.sign((u[e] * p[:, :rank]).sum(dim=0))
        torch.testing.assert_close(found, p[:, :rank] * s[:rank], atol=1e-4, rtol=1e-4)
        if e == best:
            expected = p[:, :rank] * s[:rank] @ qt[:rank] @ torch.linalg.inv(root)
            torch.testing.assert_close(u[e] @ v, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [MoESVD(), MoESVD(refit_u=True), MoESVD(rows="stack")])
def test_identical_experts_lose_nothing_at_full_rank(method: MoESVD) -> None:
    model, held = tiny("qwen3_moe"), measured()[1]
    for layer in model.layers:
        for parameter in expert_parameters(layer.experts).values():
            parameter.data = parameter.data[:1].repeat(8, 1, 1)
    tensors = {i: dict(t) for i, t in held.tensors.items()}
    if not method.refit_u and method.rows == "frequent":
        for t in tensors.values():
            t |= {n: t[n][:1].repeat(8, *[1] * (t[n].dim() - 1)) for n in list(t)}
    views = [StatisticSet(tensors).of(layer, method.requires) for layer in model.layers]
    plan = extended(Plan(), method.decide(model.layers, views, [10**9] * 2))
    for old, new in zip(model.layers, apply_plan(model, plan).layers, strict=True):
        for a, b in zip(old.stack(), new.stack(), strict=True):
            torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)


def test_least_squares_loses_less_and_rows_of_all_experts_less_still() -> None:
    published, refit, stack = (
        lost(m) for m in (MoESVD(), MoESVD(refit_u=True), MoESVD(rows="stack"))
    )
    for name in published:
        assert refit[name] < 0.9 * published[name]
    assert sum(stack.values()) < sum(refit.values())


def test_trimming_keeps_k_columns_and_the_best_mixtures_lose_less() -> None:
    trimmed = planned(MoESVD(distinct=3), 0.8)
    spec, tensors = trimmed.layers[0].bank, trimmed.of_layer(0)
    assert spec.integers["distinct"] == 3
    assert tensors["up.U"].shape == (3, 8, spec.integers["up"])
    assert tensors["up.mix"].shape == (8, 3)
    torch.testing.assert_close(tensors["up.mix"].sum(dim=1), torch.ones(8))
    found = [sum(lost(MoESVD(distinct=3, refit_u=r), 0.8).values()) for r in (False, True)]
    assert found[1] < 0.9 * found[0]
    assert planned(MoESVD(distinct=99), 0.4).layers[0].bank.integers["distinct"] == 8


def test_a_trimmed_form_that_is_smaller_than_asked_is_refused() -> None:
    layers = measured()[0].layers
    with pytest.raises(OutOfReach, match=r"ratios from 0\.\d+ to 0\.\d+ can be reached"):
        MoESVD(distinct=1).check(layers, Ratio(0.1), Uniform())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_most_sensitive_layers_stay_to_the_bit_and_the_ratio_is_met(family: str) -> None:
    model, held = measured(family, 4)
    method = MoESVD(dense_layers=2)
    method.check(model.layers, Ratio(0.3), Uniform())
    plan = make_plan(method, model.layers, held, Ratio(0.3), Uniform())
    views = [held.of(layer, method.requires) for layer in model.layers]
    found = {la.index: sensitivity(la, v) for la, v in zip(model.layers, views, strict=True)}
    assert all(s >= 0 for s in found.values())
    changed = {part.layer for part in plan.layers}
    assert changed == set(sorted(found, key=lambda i: found[i])[:2])
    student = apply_plan(model, plan)
    for old, new in zip(model.layers, student.layers, strict=True):
        if old.index not in changed:
            pairs = zip(old.experts.parameters(), new.experts.parameters(), strict=True)
            assert all(a is b for a, b in pairs)
    sizes = Sizes.of(student, 2).removed_of_experts(Sizes.of(model, 2))
    assert 0.3 <= sizes < 0.36
    assert OutlierShare() not in MoESVD().requires


def test_an_unused_expert_adds_nothing_to_sensitivity() -> None:
    model, held = measured()
    method, layer = MoESVD(dense_layers=1), model.layers[0]
    silent = {n: t.clone() for n, t in held.tensors[0].items()}
    for name in ("count", "outlier_share_2"):
        silent[name][:] = 0
        silent[name][2] = held.tensors[0][name][2]
    view = StatisticSet({0: silent}).of(layer, method.requires)
    ranks = 0.0
    for weight in layer.stack():
        s = torch.linalg.svdvals(weight[2])
        ranks += float((s >= 0.01 * s[0]).sum()) / 3
    expected = ranks * float(silent["outlier_share_2"][2]) / float(silent["count"][2])
    assert sensitivity(layer, view) == pytest.approx(expected)
    nothing = {n: 0 * t for n, t in silent.items()}
    assert sensitivity(layer, StatisticSet({0: nothing}).of(layer, method.requires)) == 0


def test_never_routed_experts_stay_finite() -> None:
    model, held = measured()
    tensors = {i: {n: t.clone() for n, t in held.tensors[i].items()} for i in held.tensors}
    for t in tensors.values():
        for tensor in t.values():
            tensor[5] = 0
    for method in (MoESVD(), MoESVD(rows="stack"), MoESVD(distinct=3, refit_u=True)):
        ratio = Ratio(0.7)
        plan = make_plan(method, model.layers, StatisticSet(tensors), ratio, Uniform())
        assert all(torch.isfinite(t).all() for t in plan.tensors.values())


def test_shared_rows_are_normed() -> None:
    model, held = measured()
    plan = planned(MoESVD(shrink=0.0, ridge=0.0))
    count = held.tensors[0]["count"]
    e, v = int(count.argmax()), plan.tensors["layers.0.down.V"].double()
    moment = held.tensors[0]["middle_moment_g0"][e] / count[e]
    eye = torch.eye(len(v)).double()
    torch.testing.assert_close(v @ moment @ v.T, eye, atol=1e-4, rtol=1e-4)
    assert len(principal(model.layers[0].stack().down[e].double(), moment)[0]) >= len(v)
