"""A student as a plain transformers model, or why stock transformers cannot hold it."""

import copy
from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn

from rerail.errors import InputError
from rerail.experts.base import ExpertBank, SolvedBank
from rerail.export.families import family_of
from rerail.export.widths import name_of_width, narrow_stock, narrowed_width
from rerail.moe.families import traits_of
from rerail.moe.fused_experts import expert_parameters, shell_of
from rerail.moe.model import MoELayer, MoEModel
from rerail.moe.router import MaskedRouter
from rerail.plan.apply import write_expert_count


def check_native(student: MoEModel, densify: bool = False) -> None:
    """Check that stock transformers can hold a student; reads shapes only.

    A stock config has one expert count for all layers and a stock block one whole expert for each
    router row. `densify` writes out whole experts, which cures every stored form; it cures neither
    layers of different counts nor a masked router that cannot be sliced.

    Raises:
        InputError: a layer's form, alias, mask or count has no place in a stock checkpoint.
    """
    if family_of(student.config) != student.config.model_type:
        raise InputError(
            "export.form='native' cannot write a model that was read from a package; export the "
            "student of the original model"
        )
    for layer in student.layers:
        if not densify:
            _check_form(layer)
        _check_mask(layer)
    if densify:
        check_plain(student)
    else:
        _check_sharing(student)
        _check_widths(student)
    counts = {layer.index: len(selectable_rows(layer)) for layer in student.layers}
    first, count = next(iter(counts.items()))
    for index, other in counts.items():
        if other != count:
            raise _refusal(
                index,
                f"it keeps {other} experts and layer {first} keeps {count}, and a stock config has "
                "one count for all; use a plan that keeps the same number in every layer "
                "(allocation=uniform), which densify=true cannot change",
            )


def is_whole_form(experts: nn.Module) -> bool:
    """Return whether all that is stored are whole experts, each as one row of fused tensors."""
    if not isinstance(experts, ExpertBank):
        return True
    own = any(True for _ in experts.parameters(recurse=False))
    return not (own or experts.wraps or isinstance(experts, SolvedBank))


def check_plain(student: MoEModel) -> None:
    """Check that every form has plain experts to become.

    Raises:
        InputError: a form computes what plain experts cannot.
    """
    for layer in student.layers:
        if not is_whole_form(layer.experts) and not isinstance(layer.experts, SolvedBank):
            layer.stock()


def _refusal(index: int, reason: str) -> InputError:
    return InputError(f"export.form='native' cannot hold layer {index}: {reason}")


def _check_form(layer: MoELayer) -> None:
    """Each router row must be answered by a whole expert of its own."""
    bank = layer.experts
    if not isinstance(bank, ExpertBank):
        return
    spec = bank.spec
    if not is_whole_form(bank) and narrowed_width(layer) is None:
        cure = "use export.form=package" + ("" if bank.wraps else " or set export.densify=true")
        raise _refusal(
            layer.index,
            f"its experts are stored in the form {spec.kind!r}, and stock transformers reads whole "
            f"experts only; {cure}",
        )
    answered = bank.slots[list(selectable_rows(layer))].tolist()
    stored = len(set(answered))
    if stored < len(answered):
        summed = spec.kind == "merged" or any(len(group) > 1 for group in spec.members)
        form = "merged" if summed else "alias"
        raise _refusal(
            layer.index,
            f"in the form {form!r} {stored} stored experts answer {len(answered)} router rows, and "
            "stock transformers reads one expert for each row; set export.densify=true",
        )


def _check_sharing(student: MoEModel) -> None:
    """No stored expert may answer in two layers."""
    owner: dict[Hashable, int] = {}
    for layer in student.layers:
        for name in layer.stored():
            if name in owner:
                raise _refusal(
                    layer.index,
                    f"in the form 'alias' it shares a stored expert with layer {owner[name]}, and "
                    "stock transformers reads one for each layer; set export.densify=true",
                )
            owner[name] = layer.index


def _check_widths(student: MoEModel) -> None:
    """Narrowed experts need one width in all layers, and a name for it in the config."""
    widths = {la.index: narrowed_width(la) or la.intermediate_size for la in student.layers}
    first, width = next(iter(widths.items()))
    for index, other in widths.items():
        if other != width:
            raise _refusal(
                index,
                f"its experts have width {other} and those of layer {first} {width}, and a stock "
                "config has one width for all; use export.form=package or set export.densify=true",
            )
    if width != student.layers[0].intermediate_size and name_of_width(student, width) is None:
        raise _refusal(
            first,
            f"the config of the family has no entry that gives only routed experts the width "
            f"{width}; use export.form=package or set export.densify=true",
        )


def _check_mask(layer: MoELayer) -> None:
    """A stock router has no mask, so its rows must be such that they can be sliced instead."""
    groups = layer.num_groups
    if not isinstance(layer.router, MaskedRouter) or groups == 1:
        return
    size = layer.num_experts // groups
    kept = [sum(row // size == g for row in selectable_rows(layer)) for g in range(groups)]
    if len(set(kept)) > 1 or kept[0] < 2:
        raise _refusal(
            layer.index,
            f"its masked router keeps {kept} rows in its {groups} groups, a stock router has no "
            "mask, and sliced rows must be equally many in each group, at least 2; use "
            "compressor.router=slice",
        )


def selectable_rows(layer: MoELayer) -> tuple[int, ...]:
    """Return the router rows that can be chosen: all, but for those that a mask silences."""
    if not isinstance(layer.router, MaskedRouter):
        return tuple(range(layer.num_experts))
    return tuple(torch.nonzero(~layer.router.get_buffer("dropped")).flatten().tolist())


def stock_model(student: MoEModel, densify: bool = False) -> MoEModel:
    """Return a model of stock modules only that computes what the student computes.

    Every bank becomes one whole expert for each router row; a masked router loses its silent rows,
    which leaves the choice and the gate weights as they were. What is not routed stays the
    student's own Parameter objects; the student is not touched.

    Raises:
        InputError: as `check_native`.
    """
    check_native(student, densify)
    plain = student.with_shared_parameters()
    width = None if densify else narrowed_width(student.layers[0])
    if width is not None and (name := name_of_width(student, width)):
        setattr(plain.config, name, width)
    for layer in plain.layers:
        rows = selectable_rows(layer)
        layer.swap(_pick(layer.stock() if width is None else narrow_stock(layer), rows))
        if isinstance(layer.router, MaskedRouter):
            _slice_masked(layer, rows)
    write_expert_count(plain)
    return plain


def _pick(experts: nn.Module, rows: tuple[int, ...]) -> nn.Module:
    if len(rows) == experts.num_experts:
        return experts
    held = {n: p.detach()[list(rows)] for n, p in expert_parameters(experts).items()}
    return shell_of(experts, held, len(rows))


def _slice_masked(layer: MoELayer, rows: tuple[int, ...]) -> None:
    traits = traits_of(layer.block)
    assert traits is not None
    setattr(layer.block, traits.router, layer.inner_router)
    if len(rows) < layer.num_experts:
        layer.keep_rows(rows)


def recast(model: MoEModel, dtype: torch.dtype) -> MoEModel:
    """Return a copy whose parameters are in `dtype`; those that are in it stay the same objects.

    Never `.to(dtype)`, which would change shared Parameters in place. Parameters that the family
    keeps in float32 whatever the dtype (correction biases, say) are float32; buffers stay as they
    are, and so do tensors of a stored form that have a dtype of their own.
    """
    inner = cast(Any, model.model)
    always = inner._get_dtype_plan(dtype)
    memo: dict[int, Any] = {id(b): b for b in inner.buffers()}
    banks = [layer.experts for layer in model.layers if isinstance(layer.experts, ExpertBank)]
    held = [p for bank in banks for p in bank.parameters()]
    memo |= {id(p): p for p in held if p.dtype != inner.dtype}
    for name, parameter in inner.named_parameters():
        wide = any(part in name for part in always)
        memo.setdefault(id(parameter), _cast(parameter, torch.float32 if wide else dtype))
    return MoEModel(copy.deepcopy(inner, memo))


def _cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if parameter.dtype == dtype or not parameter.is_floating_point():
        return parameter
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
