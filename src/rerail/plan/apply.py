"""Apply a plan: teacher + plan -> student that shares every Parameter it does not change."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rerail.experts.base import bank_class, build_bank
from rerail.moe.attention import watch_attention
from rerail.moe.families import match_row_counts, set_expert_count
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.plan import ROWS, LayerPlan, Plan


def apply_plan(teacher: MoEModel, plan: Plan) -> MoEModel:
    """Return the student.

    Attention, embeddings, norms, head and shared experts are the teacher's own Parameter objects;
    router rows that the plan slices are new. The empty plan gives bit-equal logits.

    Raises:
        InputError: the plan does not fit the model.
    """
    plan.validate(teacher.layers)
    student = _apply_stage(teacher, plan)
    return apply_plan(student, plan.then) if plan.then else student


def _apply_stage(teacher: MoEModel, plan: Plan) -> MoEModel:
    student = teacher.with_shared_parameters()
    apply_to_layers(student.layers, plan)
    write_expert_count(student)
    watch_attention(student.model, {layer.name: layer.block for layer in student.layers})
    return student


def apply_to_layers(layers: Sequence[MoELayer], plan: Plan) -> None:
    """Put the routers and banks of one stage into these layers, in place."""
    by_index = {layer.index: layer for layer in layers}
    reads = {i for part in plan.layers for i in part.bank.reads() | {part.layer}}
    around = {part.layer for part in plan.layers if bank_class(part.bank.kind).wraps}
    stocks = {i: by_index[i].experts if i in around else by_index[i].stock() for i in reads}
    for part in plan.layers:
        _apply_layer(by_index[part.layer], part, stocks, plan.of_layer(part.layer))


def _apply_layer(
    layer: MoELayer, part: LayerPlan, stocks: Mapping[int, nn.Module], tensors: Mapping[str, Tensor]
) -> None:
    solved = {name: tensor for name, tensor in tensors.items() if name != ROWS}
    layer.swap(build_bank(part.bank, part.slots, layer.index, stocks, solved))
    if part.router in ("slice", "pooled") and len(part.kept) < layer.num_experts:
        layer.keep_rows(part.kept)
    if part.router == "mask" and len(part.kept) < layer.num_experts:
        layer.mask_rows(part.kept)
    if part.router == "pooled":
        owner, name = layer.rows_owner()
        own = getattr(owner, name).detach()  # rows of shared experts lie behind
        rows = torch.cat([tensors[ROWS].to(own), own[len(part.kept) :]])
        owner._parameters[name] = nn.Parameter(rows, requires_grad=False)


def write_expert_count(student: MoEModel) -> None:
    """Write a uniform new expert count into a model's own config, where it has one."""
    rows = {layer.num_experts for layer in student.layers}
    if len(rows) == 1:
        set_expert_count(student.config, rows.pop())
    match_row_counts(student.model)
