import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.templates.skipper import (
    Skipper,
    below,
    check_fitted,
    nearest,
    without_policies,
)
from rerail.errors import InputError, OutOfReach
from rerail.evaluate.routing import record_routing
from rerail.experts.skip_policy import BINS, SkipPolicy
from rerail.methods.naee_skip import NAEESkip
from rerail.methods.odp import ODP
from rerail.methods.reap import MomentScore
from rerail.moe.model import MoEModel
from rerail.plan.allocation import GlobalScore, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio, Skip
from rerail.plan.plan import Plan
from rerail.statistics.collect import Batch, collect
from rerail.statistics.statistic import Statistic, StatisticSet

K = {"num_experts_per_tok": 4}


def batches() -> list[Batch]:
    ids = tokens(12, 32)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[10:, 20:] = False
    return list(zip(ids.split(4), mask.split(4), strict=True))


def measured(model: MoEModel, statistics: tuple[Statistic, ...]) -> StatisticSet:
    return collect(model, batches(), statistics)


def plan_of(method: Skipper, model: MoEModel, share: float | None = None) -> Plan:
    found = measured(model, method.requires)
    return make_plan(method, model.layers, found, Skip(share), Uniform())


def active(model: MoEModel) -> float:
    with record_routing(model) as routing, torch.no_grad():
        for ids, mask in batches():
            routing.mask = mask
            model.hidden(ids, mask)
    return routing.mean_active_experts


def trace_share(model: MoEModel, plan: Plan) -> list[float]:
    """Return the share of activations that each layer skips on the unskipped model's traffic."""
    shares = []
    for layer in model.layers:
        seen: list[torch.Tensor] = []
        hook = layer.experts.register_forward_pre_hook(lambda _, args, to=seen: to.append(args))
        bank = apply_plan(model, plan).layers[layer.index].experts
        with torch.no_grad():
            for ids, mask in batches():
                model.hidden(ids, mask)
                seen[-1] = tuple(x[mask.flatten()] for x in seen[-1])
        hook.remove()
        skip = torch.cat([bank.skipped(hidden, gates) for hidden, _, gates in seen])
        shares.append(float(skip.double().mean()))
    return shares


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3", "granitemoe"])
def test_the_median_skips_half_of_the_second_experts(family):
    model = tiny(family)
    plan = plan_of(NAEESkip(), model)
    for share in trace_share(model, plan):
        assert 0.45 / 2 <= share <= 0.55 / 2
    for layer in model.layers:
        tails = measured(model, NAEESkip().requires).tensors[layer.index]["gate_tails"]
        found = int(plan.of_layer(layer.index)["threshold"])
        assert abs(below(tails, found / BINS) - int(tails.sum()) // 2) <= int(tails.max())


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.7])
def test_a_share_is_met_on_the_calibration_text(share):
    model = tiny("qwen3_moe", **K)
    plan = plan_of(NAEESkip(), model, share)
    assert trace_share(model, plan) == pytest.approx([share, share], abs=0.005)
    assert plan.lineage["removed"] == share


def test_the_highest_share_leaves_one_expert_on_any_text():
    model = tiny("qwen3_moe", **K)
    student = apply_plan(model, plan_of(NAEESkip(), model, 0.75))
    assert active(student) == 1


def test_shares_that_cannot_be_reached_are_refused():
    model, one = tiny("qwen3_moe", **K), tiny("qwen3_moe", num_experts_per_tok=1)
    with pytest.raises(OutOfReach, match=r"allowed shares: from 0 to 0\.75"):
        NAEESkip().check(model.layers, Skip(0.8), Uniform())
    with pytest.raises(OutOfReach, match="keeps one of 1 experts"):
        NAEESkip().check(one.layers, Skip(), Uniform())
    with pytest.raises(OutOfReach, match="allocation=uniform"):
        NAEESkip().check(model.layers, Skip(), GlobalScore())
    with pytest.raises(OutOfReach, match="is swept by skip"):
        NAEESkip().check(model.layers, Ratio(0.5), Uniform())
    with pytest.raises(InputError, match="outside"):
        ODP(protect=1.5)


def test_no_text_is_said():
    model = tiny("qwen3_moe")
    empty = StatisticSet({i: {"gate_tails": torch.zeros(BINS, dtype=torch.int64)} for i in (0, 1)})
    with pytest.raises(InputError, match="no token to fit"):
        make_plan(NAEESkip(), model.layers, empty, Skip(), Uniform())


def test_skip_zero_is_the_empty_plan():
    model = tiny("qwen3_moe")
    assert make_plan(ODP(), model.layers, StatisticSet(), Skip(0), Uniform()).layers == ()


def test_the_mean_rule_is_the_mean_of_the_tails():
    tails = torch.zeros(BINS, dtype=torch.int64)
    tails[BINS // 8], tails[BINS // 2] = 3, 1
    found = NAEESkip(beta="mean").threshold(tails)
    assert found == pytest.approx((3 * 0.125 + 0.5) / 4, abs=1e-4)


def test_the_nearest_threshold_is_found_among_gaps():
    tails = torch.zeros(BINS, dtype=torch.int64)
    tails[10], tails[20] = 4, 6
    assert nearest(tails, 0).tolist() == [0]
    assert nearest(tails, 4).tolist() == nearest(tails, 6).tolist() == [11]
    assert nearest(tails, 8).tolist() == [21]
    assert nearest(tails, 10).tolist() == [BINS]
    assert below(tails, 11 / BINS) == 4


def test_odp_spares_tokens_and_skips_a_little_less():
    model = tiny("qwen3_moe")
    plain = active(apply_plan(model, plan_of(NAEESkip(), model)))
    some = active(apply_plan(model, plan_of(ODP(protect=0.25), model)))
    whole = active(apply_plan(model, plan_of(ODP(protect=1.0), model)))
    assert 1.3 < plain < some < whole == 2
    assert active(apply_plan(model, plan_of(ODP(protect=0.0), model))) == pytest.approx(plain)


@pytest.mark.parametrize("method", [NAEESkip(), ODP(protect=0.1)])
def test_thresholds_are_fitted_again_after_a_repair(method):
    model = tiny("qwen3_moe")
    student = apply_plan(model, plan_of(method, model))
    check_fitted(student)
    old = [int(layer.experts.threshold) for layer in student.layers]
    for layer in student.layers:  # as a repair does: new rows in the student only
        owner, name = layer.rows_owner()
        rows = layer.router_rows.detach() * 0.2
        owner._parameters[name] = torch.nn.Parameter(rows, requires_grad=False)
    with pytest.raises(InputError, match="fit it again on this router"):
        check_fitted(student)
    with pytest.raises(InputError, match="fit it again on this router"):
        apply_plan(without_policies(student), plan_of(method, model))
    plan = method.refit(student, lambda m: measured(m, method.requires), Skip())
    again = apply_plan(without_policies(student), plan)
    check_fitted(again)
    assert all(int(la.experts.threshold) > o for la, o in zip(again.layers, old, strict=True))
    assert not any(isinstance(layer.experts.inner, SkipPolicy) for layer in again.layers)
    for mine, theirs in zip(again.layers, student.layers, strict=True):
        assert mine.router_rows is theirs.router_rows


def test_stale_thresholds_are_taken_where_that_is_asked_for():
    model, other = tiny("qwen3_moe"), tiny("qwen3_moe", seed=1)
    apply_plan(other, plan_of(NAEESkip(allow_stale=True), model))
    with pytest.raises(InputError, match="allow_stale"):
        apply_plan(other, plan_of(NAEESkip(), model))


def test_a_pruned_student_can_skip_and_be_fitted_again():
    model, pruner = tiny("qwen3_moe"), MomentScore()
    found = measured(model, pruner.requires)
    first = make_plan(pruner, model.layers, found, Ratio(0.5), Uniform())
    pruned = apply_plan(model, first)
    chain = Plan(first.layers, {}, {}, plan_of(NAEESkip(), pruned))
    student = apply_plan(model, chain)
    assert active(student) < 1.8
    assert active(without_policies(student)) == 2
    back = Plan.from_json(chain.to_json(), chain.all_tensors())
    ids = tokens(2, 8)
    assert torch.equal(apply_plan(model, back).model(ids).logits, student.model(ids).logits)
    plan = NAEESkip().refit(student, lambda m: measured(m, NAEESkip().requires), Skip())
    assert plan.layers == chain.then.layers
