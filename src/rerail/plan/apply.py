"""Apply a plan: teacher + plan -> student that shares every Parameter it does not change."""

import torch

from rerail.moe.bank import build_bank
from rerail.moe.layer import MoELayer, MoEModel
from rerail.plan.plan import LayerPlan, Plan


def apply_plan(teacher: MoEModel, plan: Plan) -> MoEModel:
    """Return the student.

    Attention, embeddings, norms, head and shared experts are the teacher's own Parameter objects;
    router rows that the plan slices are new. The empty plan gives bit-equal logits.

    Raises:
        InputError: the plan does not fit the model.
    """
    plan.validate(teacher.layers)
    student = teacher.with_shared_parameters()
    by_index = {layer.index: layer for layer in student.layers}
    for part in plan.layers:
        tensors = {
            n: t.to(by_index[part.layer].router_rows) for n, t in plan.of_layer(part.layer).items()
        }
        _apply_layer(by_index[part.layer], part, tensors)
    _tell_config(student)
    return student


def _apply_layer(layer: MoELayer, part: LayerPlan, tensors: dict[str, torch.Tensor]) -> None:
    layer.swap(build_bank(part.bank, part.slots, layer.experts, tensors))
    if part.router == "slice" and len(part.kept) < layer.num_experts:
        layer.keep_rows(part.kept)
    if part.router == "mask" and len(part.kept) < layer.num_experts:
        layer.mask_rows(part.kept)


def _tell_config(student: MoEModel) -> None:
    """Write a uniform new expert count into the student's own config, where the family keeps one."""
    rows = {layer.num_experts for layer in student.layers}
    config = student.config
    if len(rows) != 1:
        return
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, next(iter(rows)))
