"""How many choices are answered by other than the teacher's own expert, for every stored form."""

import dataclasses
from functools import partial

import pytest
import torch

from families import tiny
from rerail.evaluate.routing import record_routing
from rerail.evaluate.scores import score_texts
from rerail.experts.novice import NoviceExperts
from rerail.plan.apply import apply_plan
from rerail.plan.plan import Plan
from stored_forms import KINDS, aliased, factored, fused, lent, masked, merged, sliced, solved
from stored_forms import skipping as skipped
from students import blocks


def pooled():
    parts = [dataclasses.replace(part, router="pooled") for part in sliced().layers]
    rows = {f"layers.{i}.router.rows": torch.randn(4, 16) for i in range(2)}
    return Plan(tuple(parts), {}, rows)


def then(first: Plan, second: Plan) -> Plan:
    return dataclasses.replace(first, then=second)


def sliced_twice():
    """Of the four experts that stay in each layer, the second, third and fourth stay."""
    return then(sliced(), sliced((KEPT_AGAIN, KEPT_AGAIN)))


KEPT_AGAIN = (1, 2, 3)
PLANS = {
    "nothing": Plan,
    "slice": sliced,
    "mask": masked,
    "pooled rows": pooled,
    "alias": aliased,
    "sums": merged,
    "experts of another layer": lent,
    "a skipping policy": skipped,
    "a slice of a slice": sliced_twice,
    "a skipping policy on a slice": lambda: then(merged(), skipped()),
    "basis by hand": factored,
    "merged": lambda: fused(tiny("qwen3_moe")),
    **{name: partial(solved, tiny("qwen3_moe"), name) for name in KINDS},
}


def behind(plan: Plan, layer: int) -> list[int]:
    """The teacher's slot that each router row of the student stands for."""
    slots = list(range(8))
    for stage in plan.stages:
        for part in (p for p in stage.layers if p.layer == layer):
            if part.router in ("slice", "pooled"):
                slots = [slots[row] for row in part.kept]
    return slots


def is_own(student, teacher, row: int, slot: int) -> bool:
    """Whether the weights that answer a row are the teacher's of the slot, to the bit."""
    bank = student.bank
    if isinstance(bank, NoviceExperts) and int(bank.slots[row]) >= 8:
        return False
    pairs = zip(student.expert(row), teacher.expert(slot), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)


@pytest.mark.parametrize("name", PLANS)
def test_a_row_is_changed_where_its_weights_are_not_those_of_the_teachers_slot(name):
    teacher, plan = tiny("qwen3_moe"), PLANS[name]()
    student = apply_plan(teacher, plan)
    for mine, own in zip(student.layers, teacher.layers, strict=True):
        slots = behind(plan, own.index)
        changed = plan.changed_rows(own.index, 8)
        assert len(changed) == mine.num_experts == len(slots)
        assert changed == [not is_own(mine, own, row, slot) for row, slot in enumerate(slots)]


EXPECTED = {  # in each layer
    "nothing": ([0] * 8, [0] * 8),
    "slice": ([0] * 4, [0] * 4),
    "pooled rows": ([0] * 4, [0] * 4),
    "alias": ([1, 0, 1, 1, 0, 1, 0, 1],) * 2,
    "sums": ([1] * 8, [1] * 8),
    "experts of another layer": ([0] * 8, [1] * 8),
    "a slice of a slice": ([0] * 3, [0] * 3),
    "a skipping policy": ([0] * 8, [0] * 8),
    "a skipping policy on a slice": ([1] * 8, [1] * 8),
    "novice": ([1, 0, 1, 1, 0, 1, 0, 1],) * 2,
    "low_rank": ([1] * 8, [1] * 8),
    "quantized": ([1] * 8, [1] * 8),
    "merged": ([1] * 8, [1] * 8),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_by_hand(name):
    if name == "novice":  # stored in another order than its slots
        teacher, plan = tiny("qwen3_moe"), PLANS[name]()
        parts = [dataclasses.replace(p, slots=(3, 0, 4, 5, 1, 6, 2, 7)) for p in plan.layers]
        plan = dataclasses.replace(plan, layers=tuple(parts))
        plan.validate(teacher.layers)
    else:
        plan = PLANS[name]()
    for layer, expected in enumerate(EXPECTED[name]):
        assert plan.changed_rows(layer, 8) == [bool(changed) for changed in expected]


def test_shares_count_choices_and_gate_weights_at_real_tokens_of_all_blocks():
    teacher, text, plan = tiny("olmoe"), blocks(5, 11), aliased()
    student = apply_plan(teacher, plan)
    caught = []
    with record_routing(student) as routing:
        routing.mask = text.mask
        hook = student.layers[1].experts.register_forward_pre_hook(
            lambda _, args: caught.append(args)
        )
        student.hidden(text.input_ids, text.mask)
        hook.remove()
    real = text.mask.flatten()
    [(_, chosen, gates)] = caught
    moved = torch.tensor(plan.changed_rows(1, 8))[chosen[real]]
    weights = gates[real].double()
    assert 0 < float(moved.double().mean()) < 1

    reference = score_texts(teacher, {"a": text})
    for size in (2, 5):
        scores = score_texts(student, {"a": text}, reference, plan, batch_size=size)
        layer = scores.layers()[1]
        assert layer.changed_choices == pytest.approx(float(moved.double().mean()))
        mass = float((weights * moved).sum() / weights.sum())
        assert layer.changed_mass == pytest.approx(mass, rel=1e-5)
        assert layer.changed_mass != pytest.approx(layer.changed_choices, rel=1e-3)
    assert {la.changed_choices for la in reference.layers()} == {0.0}
    assert {la.changed_mass for la in reference.layers()} == {0.0}
