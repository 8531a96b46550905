import json

import pytest
import torch

from families import tiny, tokens
from rerail.errors import InputError
from rerail.experts.base import BankSpec
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoEModel
from rerail.plan.apply import apply_plan
from rerail.plan.plan import LayerPlan, Plan
from rerail.plan.sizes import Sizes

SLOTS = (0, 0, 1, 1, 2, 2, 3, 3)
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss"]


def plan_of(teacher: MoEModel, chosen: list[int]) -> Plan:
    """Return a plan that stores the chosen experts, two slots each, as solved tensors."""
    parts, tensors = [], {}
    for layer in teacher.layers:
        fused = {n: p[chosen].double() for n, p in expert_parameters(layer.experts).items()}
        shapes = {n: tuple(t.shape[1:]) for n, t in fused.items()}
        spec = BankSpec("merged", len(chosen), (), shapes)
        parts.append(LayerPlan(layer.index, tuple(range(8)), SLOTS, "untouched", spec))
        tensors |= {f"layers.{layer.index}.{n}": t for n, t in fused.items()}
    return Plan(tuple(parts), {}, tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_experts_answer_their_slots_in_the_dtype_of_the_model(family: str) -> None:
    teacher = tiny(family)
    student = apply_plan(teacher, plan_of(teacher, [1, 3, 5, 7]))
    for old, new in zip(teacher.layers, student.layers, strict=True):
        for slot in range(8):
            for a, b in zip(new.expert(slot), old.expert(2 * (slot // 2) + 1), strict=True):
                assert torch.equal(a, b)
                assert a.dtype == torch.float32
        new.swap(new.stock())
    plain, again = student, apply_plan(teacher, plan_of(teacher, [1, 3, 5, 7]))
    ids = tokens()
    torch.testing.assert_close(
        plain.model(ids).logits, again.model(ids).logits, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_tensors(family: str) -> None:
    teacher = tiny(family)
    plan = plan_of(teacher, [0, 2, 4, 6])
    student = apply_plan(
        teacher, Plan.from_json(json.loads(json.dumps(plan.to_json())), plan.tensors)
    )
    assert Sizes.predicted(teacher, plan, 2) == Sizes.of(student, 2)
    expected = sum(4 * layer.expert_size for layer in teacher.layers)
    assert Sizes.of(student, 2).routed == expected == sum(t.numel() for t in plan.tensors.values())


@pytest.mark.parametrize("damage", ["shape", "missing", "spec"])
def test_tensors_of_another_shape_are_refused(damage: str) -> None:
    teacher = tiny("gpt_oss")
    plan = plan_of(teacher, [0, 2, 4, 6])
    name = "layers.0.gate_up_proj_bias"
    if damage == "shape":
        plan.tensors[name] = plan.tensors[name][:, :-1]
    if damage == "missing":
        del plan.tensors[name]
    if damage == "spec":
        plan.layers[0].bank.integers["down_proj"] = (3, 16)
        plan.tensors["layers.0.down_proj"] = plan.tensors["layers.0.down_proj"][:, :3]
    with pytest.raises(InputError, match="'merged' needs the tensors"):
        plan.validate(teacher.layers)
