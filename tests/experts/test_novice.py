import json

import pytest
import torch

from families import tiny, tokens
from rerail.errors import InputError
from rerail.evaluate.routing import record_routing
from rerail.experts.base import BankSpec
from rerail.moe.model import MoEModel
from rerail.plan.apply import apply_plan
from rerail.plan.plan import LayerPlan, Plan

KEPT = (1, 2, 5)
OTHERS = (0, 3, 4, 6, 7)


def plan_of(teacher: MoEModel, novices: torch.Tensor) -> Plan:
    slots = tuple(KEPT.index(e) if e in KEPT else 3 + OTHERS.index(e) for e in range(8))
    spec = BankSpec("novice", 8, (), {"kept": KEPT})
    parts = tuple(
        LayerPlan(la.index, tuple(range(8)), slots, "untouched", spec) for la in teacher.layers
    )
    return Plan(parts, {}, {f"layers.{la.index}.novices": novices for la in teacher.layers})


def routed(model: MoEModel, layer: int = 0) -> tuple[torch.Tensor, ...]:
    """Return hidden states, slots, gate weights and the answer of one layer's experts."""
    seen = []
    hook = model.layers[layer].experts.register_forward_hook(
        lambda _, args, out: seen.append((*args, out))
    )
    with torch.no_grad():
        model.hidden(tokens(3, 16))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_answer_differs_by_gate_times_constant_minus_expert(family, implementation):
    teacher, constants = tiny(family), torch.randn(5, 16, generator=torch.manual_seed(3))
    teacher.model.set_experts_implementation(implementation)
    student = apply_plan(teacher, plan_of(teacher, constants))
    hidden, index, weights, whole = routed(teacher)
    answer = student.layers[0].experts(hidden, index, weights)
    expected = whole.clone()
    for t in range(len(hidden)):
        for slot, gate in zip(index[t].tolist(), weights[t], strict=True):
            if slot in OTHERS:
                alone = teacher.layers[0].experts(
                    hidden[t : t + 1], torch.tensor([[slot]]), torch.ones(1, 1)
                )
                expected[t] += gate * (constants[OTHERS.index(slot)] - alone[0])
    torch.testing.assert_close(answer, expected, atol=2e-5, rtol=1e-5)
    assert (answer - whole).abs().max() > 0.01


def test_kept_experts_are_the_teachers_own_parameters():
    teacher = tiny("qwen3_moe")
    student = apply_plan(teacher, plan_of(teacher, torch.zeros(5, 16)))
    for mine, theirs in zip(student.layers, teacher.layers, strict=True):
        for name, parameter in theirs.experts.named_parameters():
            assert mine.experts.shell.get_parameter(name) is parameter
        assert mine.experts.slots.tolist() == [8, 1, 2, 9, 10, 5, 11, 12]


def test_a_token_of_novices_only_costs_no_expert_and_may_lack_top_k():
    teacher = tiny("qwen3_moe")
    student = apply_plan(teacher, plan_of(teacher, torch.ones(5, 16)))
    bank = student.layers[0].experts
    hidden, index = torch.randn(2, 16), torch.tensor([[0, 3], [4, 7]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.125]])
    expected = torch.tensor([[1.0], [0.625]]).expand(2, 16)
    torch.testing.assert_close(bank(hidden, index, weights), expected)
    assert bank.active.tolist() == [0, 0]
    with record_routing(student) as routing, torch.no_grad():
        student.hidden(tokens(2, 12))
    hit = [torch.isin(routed(student, i)[1], torch.tensor(KEPT)).sum() for i in (0, 1)]
    assert [len(routing.slots(i)) for i in (0, 1)] == [24, 24]
    assert 0 < routing.mean_active_experts < 2
    assert routing.active_experts(0) != 2
    assert hit[0] > 0


def test_gate_weights_get_gradients_through_constants():
    teacher = tiny("qwen3_moe")
    student = apply_plan(teacher, plan_of(teacher, torch.randn(5, 16)))
    weights = torch.full((4, 2), 0.5, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 3], [2, 5], [6, 7]])
    student.layers[0].experts(torch.randn(4, 16), index, weights).square().sum().backward()
    assert (weights.grad != 0).all()


def test_sizes_count_experts_and_constants():
    teacher = tiny("qwen3_moe")
    plan = plan_of(teacher, torch.zeros(5, 16))
    bank = apply_plan(teacher, plan).layers[1].experts
    expert = teacher.layers[0].expert_size
    assert sum(bank.stored().values()) == 3 * expert + 5 * 16
    assert plan.stored(teacher.layers) == 2 * (3 * expert + 5 * 16)
    assert sum(bank.stored_bits(16).values()) == 16 * (3 * expert + 5 * 16)


def test_with_biases_a_constant_is_a_plain_expert():
    teacher = tiny("gpt_oss")
    student = apply_plan(teacher, plan_of(teacher, torch.randn(5, 16)))
    before = student.model(tokens(2, 8)).logits
    assert student.layers[0].experts.materialise(0).gate.count_nonzero() == 0
    for layer in student.layers:
        layer.swap(layer.stock())
    torch.testing.assert_close(student.model(tokens(2, 8)).logits, before, atol=1e-5, rtol=1e-5)


def test_without_biases_there_is_none_and_it_says_why():
    teacher = tiny("qwen3_moe")
    layer = apply_plan(teacher, plan_of(teacher, torch.randn(5, 16))).layers[0]
    for ask in (layer.stock, layer.stack, lambda: layer.expert(0)):
        with pytest.raises(InputError, match="no bias to hold one"):
            ask()
    assert torch.equal(layer.expert(5).up, teacher.layers[0].expert(5).up)


@pytest.mark.parametrize("kept", [(), (1, 1, 2), (2, 1, 5), (1, 2, 8)])
def test_kept_experts_that_do_not_exist_are_refused(kept):
    teacher = tiny("qwen3_moe")
    entry = plan_of(teacher, torch.zeros(5, 16)).to_json()
    for layer in entry["layers"]:
        layer["bank"]["integers"]["kept"] = list(kept)
    plan = Plan.from_json(json.loads(json.dumps(entry)))
    with pytest.raises(InputError, match="must be distinct, ascending and below 8"):
        plan.validate(teacher.layers)
