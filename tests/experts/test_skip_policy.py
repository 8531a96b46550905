import copy
import itertools
import logging

import pytest
import torch

from families import tiny, tokens
from rerail.errors import InputError
from rerail.evaluate.routing import record_routing
from rerail.experts import skip_policy as policy
from rerail.experts.base import BankSpec
from rerail.experts.skip_policy import BINS, SkipPolicy, protected, rescaled, tails
from rerail.moe.model import MoEModel
from rerail.plan.apply import apply_plan
from rerail.plan.plan import LayerPlan, Plan
from rerail.plan.sizes import Sizes
from students import merged, sliced

K = {"num_experts_per_tok": 4}


def plan_of(model: MoEModel, threshold: float, **options: str) -> Plan:
    parts, tensors = [], {}
    for la in model.layers:
        everyone = tuple(range(la.num_experts))
        spec = BankSpec("skip_policy", la.num_experts, (), {}, options)
        parts.append(LayerPlan(la.index, everyone, everyone, "untouched", spec))
        tensors[f"layers.{la.index}.threshold"] = torch.tensor([round(threshold * BINS)])
    return Plan(tuple(parts), {}, tensors)


def skipping(model: MoEModel, threshold: float, **options: str) -> MoEModel:
    return apply_plan(model, plan_of(model, threshold, **options))


def logits(model: MoEModel, **more: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.model(tokens(3, 16), **more).logits


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_threshold_zero_is_the_model_itself_to_the_bit(family):
    model = tiny(family)
    assert torch.equal(logits(skipping(model, 0.0)), logits(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_skipping_all_but_the_first_is_top_1_where_gates_are_normalised(family):
    actual, top_1 = logits(skipping(tiny(family, **K), 1.0)), tiny(family, num_experts_per_tok=1)
    torch.testing.assert_close(actual, logits(top_1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_slots_are_skipped_by_the_papers_rule_and_the_sum_is_kept(family):
    """Keep the least i >= 1 whose tail lies below beta of the sum (appendix A.2), in its words."""
    model, beta = tiny(family, **K), 0.4
    student, seen = skipping(model, beta), []
    bank = student.layers[0].experts
    bank.inner.register_forward_pre_hook(lambda _, args: seen.append(args))
    hook = bank.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        student.hidden(tokens(3, 16))
    hook.remove()
    (_, index, weights), (_, live, gates) = seen[0], seen[1]
    position = 0
    for row, slots in zip(weights, index, strict=True):
        order = row.argsort(descending=True)
        total = row.sum()
        keep = next(i for i in range(1, 5) if row[order[i:]].sum() < beta * total)
        left = sorted(order[:keep].tolist())
        mine = slice(position, position + keep)
        assert live[mine, 0].tolist() == slots[left].tolist()
        expected = row[left] / row[left].sum() * total
        torch.testing.assert_close(gates[mine, 0], expected, atol=1e-6, rtol=1e-5)
        position += keep
    assert position == len(live) < 4 * len(index)


def test_two_experts_follow_the_ratio_rule():
    weights = torch.rand(200, 2, generator=torch.manual_seed(0))
    beta = 0.5
    ratio = weights.min(dim=1).values / weights.max(dim=1).values
    assert torch.equal((tails(weights) < beta / (1 + beta)).any(dim=1), ratio < beta)


def test_a_slot_at_the_threshold_is_kept():
    bank = skipping(tiny("qwen3_moe"), 0.25).layers[0].experts
    weights = torch.tensor([[0.75, 0.25], [0.8125, 0.1875]])
    assert bank.skipped(torch.zeros(2, 16), weights).tolist() == [[False] * 2, [False, True]]


def test_weights_that_are_all_zero_stay_finite():
    skip = torch.tensor([[False, True], [False, True]])
    actual = rescaled(torch.tensor([[0.0, 0.0], [0.25, 0.75]]), skip)
    torch.testing.assert_close(actual, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_not_computing_a_slot_is_the_same_as_weight_zero(family):
    model = tiny(family, **K)
    bank = skipping(model, 0.4).layers[0].experts
    hidden = torch.randn(20, 16, generator=torch.manual_seed(1))
    index = torch.rand(20, 8, generator=torch.manual_seed(2)).argsort(dim=1)[:, :4]
    weights = torch.rand(20, 4, generator=torch.manual_seed(3))
    skip = bank.skipped(hidden, weights)
    expected = model.layers[0].experts(hidden, index, rescaled(weights, skip))
    assert skip.any()
    torch.testing.assert_close(bank(hidden, index, weights), expected, atol=1e-5, rtol=1e-5)
    assert bank.active.tolist() == (~skip).sum(dim=1).tolist()


@pytest.mark.parametrize("make", [sliced, merged])
def test_it_wraps_a_bank_and_stores_what_the_bank_stores(make):
    model = tiny("qwen3_moe")
    student = make(model)
    policed = skipping(student, 0.5)
    assert isinstance(policed.layers[0].experts, SkipPolicy)
    assert Sizes.of(policed, 2) == Sizes.of(student, 2)
    assert torch.equal(logits(skipping(student, 0.0)), logits(student))
    assert (logits(policed) - logits(student)).abs().max() > 1e-3
    inner = policed.layers[0].experts.inner
    names = [n for n, _ in student.layers[0].experts.shell.named_parameters()]
    for name in names:
        mine, theirs = inner.shell, student.layers[0].experts.shell
        assert mine.get_parameter(name) is theirs.get_parameter(name)


def test_a_chain_of_plans_predicts_the_sizes_of_what_is_wrapped():
    model = tiny("qwen3_moe")
    kept = (0, 2, 3, 5)
    parts = []
    for i in (0, 1):
        bank = BankSpec("dense", 4, tuple(((i, e, 1.0),) for e in kept))
        parts.append(LayerPlan(i, kept, (0, 1, 2, 3), "slice", bank))
    first = Plan(tuple(parts))
    both = Plan(first.layers, {}, {}, plan_of(apply_plan(model, first), 0.4))
    assert Sizes.predicted(model, both, 2) == Sizes.of(apply_plan(model, both), 2)
    assert Sizes.predicted(model, both, 2) == Sizes.predicted(model, first, 2)


def test_computed_experts_are_counted_on_valid_tokens_only():
    student = skipping(tiny("qwen3_moe", **K), 0.4)
    ids = tokens(3, 16)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 6:] = False
    recount, valid = [], mask.flatten()
    for layer in student.layers:
        layer.experts.register_forward_pre_hook(
            lambda bank, args: recount.append((~bank.skipped(*args[::2])).sum(dim=1)[valid])
        )
    with record_routing(student) as routing, torch.no_grad():
        routing.mask = mask
        student.hidden(ids, mask)
    assert [len(routing.slots(i)) for i in (0, 1)] == [38, 38]
    for i, per_token in enumerate(recount):
        assert routing.active_experts(i) == pytest.approx(float(per_token.double().mean()))
    both = [routing.active_experts(i) for i in (0, 1)]
    assert routing.mean_active_experts == pytest.approx(sum(both) / 2)
    assert 1 < routing.mean_active_experts < 4


def test_a_plain_model_computes_all_k():
    model = tiny("qwen3_moe", **K)
    with record_routing(model) as routing, torch.no_grad():
        model.hidden(tokens(2, 8))
    assert routing.mean_active_experts == 4


def test_the_skipped_share_rises_with_the_threshold_on_a_fixed_trace():
    weights = torch.rand(300, 4, generator=torch.manual_seed(4))
    shares = [int((tails(weights) < t).sum()) for t in torch.linspace(0, 1, 21)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 900


def test_kept_gate_weights_get_gradients_and_skipped_ones_through_the_sum_only():
    bank = skipping(tiny("qwen3_moe"), 0.4).layers[0].experts
    weights = torch.tensor([[0.55, 0.45], [0.9, 0.1]], requires_grad=True)
    hidden, index = torch.randn(2, 16, generator=torch.manual_seed(5)), torch.tensor([[0, 1]] * 2)
    bank(hidden, index, weights).square().sum().backward()
    assert bank.active.tolist() == [2, 1]
    assert torch.isfinite(weights.grad).all()
    assert weights.grad[0].abs().min() > 0
    torch.testing.assert_close(weights.grad[1, 0], weights.grad[1, 1])


def test_thresholds_survive_a_cast_of_the_model():
    student = skipping(tiny("qwen3_moe"), 0.3)
    student.model.to(torch.bfloat16)
    assert student.layers[0].experts.threshold.tolist() == [round(0.3 * BINS)]
    assert torch.isfinite(logits(student)).all()


def test_plain_experts_cannot_hold_a_policy():
    layer = skipping(tiny("qwen3_moe"), 0.3).layers[1]
    with pytest.raises(InputError, match="layer 1 skips slots by a policy"):
        layer.stock()
    assert torch.equal(layer.expert(3).up, tiny("qwen3_moe").layers[1].expert(3).up)


def test_a_policy_is_refused_on_another_router():
    model = tiny("qwen3_moe")
    hashes = [layer.router_hash() for layer in model.layers]
    assert hashes[0] != hashes[1]
    assert hashes == [layer.router_hash() for layer in tiny("qwen3_moe").layers]
    plan = plan_of(model, 0.3, router=hashes[0])
    with pytest.raises(InputError, match=f"layer 1: .* fitted on the router {hashes[0]}"):
        apply_plan(model, plan)
    wide = copy.deepcopy(model.model).to(torch.float64)
    assert MoEModel(wide).layers[0].router_hash() == hashes[0]
    biased = tiny("deepseek_v3", n_group=1)
    before = biased.layers[0].router_hash()
    biased.layers[0].router.e_score_correction_bias[2] += 1
    assert biased.layers[0].router_hash() != before


@pytest.mark.parametrize(
    ("tokens", "share", "count"), [(50, 0.3, 15), (100, 0.07, 7), (25, 0.28, 7), (50, 0.31, 16)]
)
def test_a_protected_share_that_is_a_whole_number_of_tokens_is_not_rounded_up(tokens, share, count):
    received, valid = torch.rand(1, tokens), torch.ones(1, tokens, dtype=torch.bool)
    assert int(protected(torch.ones(tokens, 3), received, valid, share).sum()) == count


def test_attention_received_protects_tokens_that_rows_would_not():
    """Token 1 receives most, though each row of the map sums to one."""
    received = torch.tensor([[0.30, 0.90, 0.10, 0.05]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    hidden = torch.ones(4, 3)
    assert protected(hidden, received, valid, 0.25).tolist() == [False, True, False, False]
    hidden[0] *= 10
    assert protected(hidden, received, valid, 0.25).tolist() == [True, False, False, False]
    grown = [protected(hidden, received, valid, s) for s in (0.0, 0.02, 0.5, 0.75, 1.0)]
    assert [int(g.sum()) for g in grown] == [0, 1, 2, 3, 4]
    for fewer, more in itertools.pairwise(grown):
        assert (more | ~fewer).all()
    valid[0, 1] = False
    actual = protected(torch.ones(4, 3), received, valid, 0.34)
    assert actual.tolist() == [True, False, True, False]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss", "lfm2_moe"])
def test_protecting_all_tokens_is_the_model_itself(family):
    model = tiny(family)
    student = skipping(model, 0.6, protect="1.0")
    assert student.config._attn_implementation == "eager"
    assert (model.config._attn_implementation == "eager") == (family == "gpt_oss")
    torch.testing.assert_close(logits(student), logits(model), atol=1e-5, rtol=1e-5)
    assert (logits(skipping(model, 0.6)) - logits(model)).abs().max() > 1e-3


def test_a_copy_protects_by_its_own_attention():
    model = tiny("qwen3_moe")
    student = skipping(model, 0.6, protect="0.3")
    expected, copied = logits(student), student.with_shared_parameters()
    assert torch.equal(logits(copied), expected)
    assert torch.equal(logits(MoEModel(copy.deepcopy(student.model))), expected)
    assert all(layer.experts.received is None for layer in (*student.layers, *copied.layers))
    assert (expected - logits(skipping(model, 0.6))).abs().max() > 1e-3


def test_protection_does_not_depend_on_batch_or_padding():
    student = skipping(tiny("qwen3_moe"), 0.6, protect="0.3")
    ids = tokens(3, 16)
    whole = student.hidden(ids)
    for i in range(3):
        torch.testing.assert_close(
            student.hidden(ids[i : i + 1])[0], whole[i], atol=1e-5, rtol=1e-5
        )
    for side in ("left", "right"):
        padded, mask = torch.zeros(3, 21, dtype=torch.int64), torch.zeros(3, 21, dtype=torch.bool)
        real = slice(5, 21) if side == "left" else slice(0, 16)
        padded[:, real], mask[:, real] = ids, True
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        out = student.model.base_model(
            input_ids=padded, attention_mask=mask.long(), position_ids=positions
        ).last_hidden_state
        torch.testing.assert_close(out[:, real], whole, atol=1e-5, rtol=1e-5)


def test_without_attention_nothing_is_protected_and_it_is_said(caplog):
    policy._warn_unprotected.cache_clear()
    model = tiny("qwen3_moe")
    student = skipping(model, 0.6, protect="1.0")
    student.model.set_attn_implementation("sdpa")
    with caplog.at_level(logging.WARNING):
        actual = logits(student)
    assert torch.equal(actual, logits(skipping(model, 0.6)))
    assert caplog.text.count("protects no token") == 1


def test_decoding_with_a_cache_protects_nothing_quietly(caplog):
    policy._warn_unprotected.cache_clear()
    student = skipping(tiny("qwen3_moe"), 0.6, protect="1.0").model
    ids = tokens(1, 6)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        first = student(ids[:, :5], use_cache=True)
        student(ids[:, 5:], past_key_values=first.past_key_values)
    assert caplog.text == ""
