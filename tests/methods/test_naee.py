import itertools

import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.sequential import sequential
from rerail.errors import InputError, OutOfReach
from rerail.methods.naee import NAEE, sum_of_norms
from rerail.moe.model import MoEModel
from rerail.plan.allocation import GlobalScore, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.collect import Batch, collect
from rerail.statistics.segments import OriginalSegments, Segments
from rerail.statistics.statistic import StatisticSet
from rerail.statistics.token_sample import OriginalTokenSample, TokenSample


def batches() -> list[Batch]:
    ids = tokens(6, 24)
    return [(part, torch.ones_like(part, dtype=torch.bool)) for part in ids.split(2)]


def planned(method: NAEE, model: MoEModel, removed: float = 0.5, allocation=None) -> Plan:
    filled = collect(model, batches(), method.requires)
    return make_plan(method, model.layers, filled, Ratio(removed), allocation or Uniform())


def loss(method: NAEE, whole: torch.Tensor, part: torch.Tensor) -> float:
    return sum(
        float((a - b).double().norm())
        for a, b in zip(whole.split(method.batch), part.split(method.batch), strict=True)
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "gpt_oss"])
def test_the_kept_subset_has_the_lowest_sum_of_batch_norms(family: str) -> None:
    model, method = tiny(family), NAEE(rows=60, batch=16)
    plan = planned(method, model)
    filled = collect(model, batches(), method.requires)
    for layer, part in zip(model.layers, plan.layers, strict=True):
        hidden = TokenSample.hidden(filled.tensors[layer.index][TokenSample(60).name])
        whole = layer.answer(hidden)
        subsets = list(itertools.combinations(range(8), 4))
        losses = [loss(method, whole, layer.answer(hidden, kept)) for kept in subsets]
        assert part.kept == subsets[losses.index(min(losses))]
        assert len(hidden) == 60


def test_norms_are_summed_over_batches_and_not_squared() -> None:
    change = torch.zeros(4, 1, 2)
    change[0, 0] = torch.tensor([3.0, 4.0])
    change[2, 0, 0] = 12.0
    assert float(sum_of_norms(change, parts=2)) == pytest.approx(17)
    assert float(sum_of_norms(change, parts=4)) == pytest.approx(13)


def test_the_published_rule_takes_one_norm_a_sequence() -> None:
    model, method = tiny("qwen3_moe"), NAEE(sequences=100)
    [ids, mask] = (torch.cat(t) for t in zip(*batches(), strict=True))
    mask[4:, 7:] = False  # padding: sequences of different lengths
    filled = collect(model, [(ids, mask)], method.requires)
    plan = make_plan(method, model.layers, filled, Ratio(0.5), Uniform())
    layer, caught = model.layers[0], []
    hook = layer.experts.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model.hidden(ids, mask)
    hook.remove()
    sequences = [h[m] for h, m in zip(caught[0].view(6, 24, -1), mask, strict=True)]
    subsets = list(itertools.combinations(range(8), 4))
    losses = [
        sum(float((layer.answer(h) - layer.answer(h, s)).double().norm()) for h in sequences)
        for s in subsets
    ]
    assert plan.layers[0].kept == subsets[losses.index(min(losses))]
    view = filled.of(layer, method.requires)
    errors = method.errors(layer, view)(subsets)
    torch.testing.assert_close(errors, torch.tensor(losses, dtype=torch.float64))
    rows = NAEE(rows=1000, batch=1000)
    one_norm = rows.errors(
        layer, collect(model, [(ids, mask)], rows.requires).of(layer, rows.requires)
    )
    assert (one_norm(subsets) < 0.9 * errors).all()


def test_whole_sequences_are_sampled_and_shards_agree() -> None:
    model, method = tiny("qwen3_moe"), NAEE(sequences=2)
    whole = [tuple(torch.cat(t) for t in zip(*batches(), strict=True))]
    parts, name = batches(), Segments(2).name
    found = [collect(model, text, method.requires).tensors[0][name] for text in (whole, parts)]
    torch.testing.assert_close(*found)
    assert Segments.labels(found[0]).bincount().tolist() == [24, 24]


def test_no_sequences_are_refused() -> None:
    with pytest.raises(InputError, match="sequences=0 must be at least 1"):
        NAEE(sequences=0)


def test_beyond_the_limit_experts_go_one_at_a_time() -> None:
    model = tiny("qwen3_moe")
    method = NAEE(rows=60, limit=69)
    kept = planned(method, model).layers[0].kept
    filled = collect(model, batches(), method.requires)
    layer = model.layers[0]
    hidden = TokenSample.hidden(filled.tensors[0][TokenSample(60).name])
    whole, left = layer.answer(hidden), list(range(8))
    while len(left) > 4:
        subsets = [[slot for slot in left if slot != one] for one in left]
        losses = [loss(method, whole, layer.answer(hidden, s)) for s in subsets]
        left = subsets[losses.index(min(losses))]
    assert kept == tuple(left)


@pytest.mark.parametrize("limit", [1, 2000])
def test_groups_of_a_sliced_router_stay_equal_and_of_a_mask_large_enough(limit: int) -> None:
    model = tiny("deepseek_v3")
    for part in planned(NAEE(rows=60, limit=limit), model).layers:
        assert [sum(slot // 4 == g for slot in part.kept) for g in (0, 1)] == [2, 2]
    for part in planned(NAEE(rows=60, limit=limit, router="mask"), model, 0.375).layers:
        assert min(sum(slot // 4 == g for slot in part.kept) for g in (0, 1)) >= 2


@pytest.mark.parametrize("limit", [1, 2000])
def test_a_guarded_expert_stays_though_the_answer_hardly_needs_it(limit: int) -> None:
    model = tiny("qwen3_moe")
    plain = planned(NAEE(rows=60, limit=limit), model)
    [guarded, *_] = sorted(set(range(8)) - set(plain.layers[1].kept))
    method = NAEE(rows=60, limit=limit, guard="outliers")
    filled = collect(model, batches(), method.requires)
    filled.tensors[1]["max_output"][guarded] = 1e6
    plan = make_plan(method, model.layers, filled, Ratio(0.5), Uniform())
    assert guarded in plan.layers[1].kept
    assert plan.layers[0].kept == plain.layers[0].kept


def test_global_allocation_gives_a_layer_that_answers_nothing_what_it_must_have() -> None:
    model = tiny("qwen3_moe")
    model.layers[0].experts.down_proj.data.zero_()
    plan = planned(NAEE(rows=60), model, 0.5, GlobalScore())
    assert [len(part.kept) for part in plan.layers] == [2, 6]


def progressive(method: NAEE, model: MoEModel) -> Plan:
    remeasure = sequential(model, batches(), method.requires, lambda _: lambda b: b)
    return make_plan(method, model.layers, StatisticSet(), Ratio(0.5), Uniform(), remeasure)


@pytest.mark.parametrize("target", ["original", "own"])
def test_progressive_search_sees_the_pruned_prefix(target: str) -> None:
    model, method = tiny("qwen3_moe"), NAEE(sequential=True, rows=60, target=target)
    plan = progressive(method, model)
    assert plan.layers[0] == planned(NAEE(rows=60), model).layers[0]
    prefix = apply_plan(model, Plan(plan.layers[:1]))
    layer = model.layers[1]
    new, old = (
        TokenSample.hidden(
            collect(m, batches(), (TokenSample(60),)).tensors[1][TokenSample(60).name]
        )
        for m in (prefix, model)
    )
    assert (new - old).abs().max() > 1e-3
    whole = layer.answer(old if target == "original" else new)
    subsets = list(itertools.combinations(range(8), 4))
    losses = [loss(method, whole, layer.answer(new, kept)) for kept in subsets]
    assert plan.layers[1].kept == subsets[losses.index(min(losses))]


def test_progressive_on_one_layer_is_layer_wise() -> None:
    model = tiny("qwen3_moe", num_hidden_layers=1)
    kept = planned(NAEE(rows=60), model).layers[0].kept
    for target in ("original", "own"):
        assert (
            progressive(NAEE(sequential=True, rows=60, target=target), model).layers[0].kept == kept
        )


@pytest.mark.parametrize(
    ("method", "allocation"),
    [(NAEE(sequential=True, guard="super"), Uniform()), (NAEE(sequential=True), GlobalScore())],
)
def test_progressive_refuses_what_compares_layers(method, allocation) -> None:
    with pytest.raises(OutOfReach, match="one layer at a time; allowed: guard=none"):
        method.check(tiny("qwen3_moe").layers, Ratio(0.5), allocation)


def test_only_what_a_target_needs_is_declared() -> None:
    assert NAEE(sequential=True, rows=9).requires == (TokenSample(9), OriginalTokenSample(9))
    assert NAEE(sequential=True, rows=9, target="own").requires == (TokenSample(9),)
    assert TokenSample(9).name != OriginalTokenSample(9).name
    both = NAEE(sequences=3, sequential=True)
    assert both.requires == (Segments(3), OriginalSegments(3))
