"""A student as a plain transformers model, or why stock transformers cannot hold it."""

import copy
from collections.abc import Hashable

import torch
from torch import nn

from rerail.errors import InputError
from rerail.export.classes import is_stock
from rerail.moe.families import WIDTH_NAMES, match_row_counts, set_expert_count
from rerail.moe.fused_experts import expert_parameters, shell_of
from rerail.moe.model import MoELayer, MoEModel
from rerail.moe.router import MaskedRouter

WRITTEN_OUT = (
    "use export.form=package, or set export.densify=true, which writes a whole expert for each "
    "router row, so that nothing is saved any more"
)
_STEP = 8  # numbers of 2 bytes in a row of 16 bytes, which the kernels of transformers ask for


def check_native(student: MoEModel, densify: bool = False) -> None:
    """Check that stock transformers can hold a student; reads shapes only.

    A stock config has one expert count for all layers and a stock block one whole expert for each
    router row. `densify` writes out whole experts, which cures every stored form; it cures neither
    layers of different counts nor a masked router that cannot be sliced.

    Raises:
        InputError: a layer's form, alias, mask or count has no place in a stock checkpoint.
    """
    if not is_stock(student.config):
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
    counts = {layer.index: len(layer.selectable_rows) for layer in student.layers}
    first, count = next(iter(counts.items()))
    for index, other in counts.items():
        if other != count:
            raise _refusal(
                index,
                f"it keeps {other} experts and layer {first} keeps {count}, and a stock config has "
                "one count for all; use a plan that keeps the same number in every layer "
                "(allocation=uniform), which densify=true cannot change",
            )


def check_plain(student: MoEModel) -> None:
    """Check that every form has plain experts to become.

    Raises:
        InputError: a form computes what plain experts cannot.
    """
    for layer in student.layers:
        layer.bank.check_plain()


def _refusal(index: int, reason: str) -> InputError:
    return InputError(f"export.form='native' cannot hold layer {index}: {reason}")


def _check_form(layer: MoELayer) -> None:
    """Each router row must be answered by a whole expert of its own."""
    bank, spec = layer.bank, layer.bank.spec
    if not bank.whole and _narrow_width(layer) is None:
        cure = "use export.form=package" if bank.wraps else WRITTEN_OUT
        raise _refusal(
            layer.index,
            f"its experts are stored in the form {spec.kind!r}, and stock transformers reads whole "
            f"experts only; {cure}",
        )
    answering = bank.slots[list(layer.selectable_rows)].tolist()
    stored = len(set(answering))
    if stored < len(answering):
        summed = spec.kind == "merged" or any(len(group) > 1 for group in spec.members)
        form = "merged" if summed else "alias"
        raise _refusal(
            layer.index,
            f"in the form {form!r} {stored} stored experts answer {len(answering)} router rows, "
            f"and stock transformers reads one expert for each row; {WRITTEN_OUT}",
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
                    f"stock transformers reads one for each layer; {WRITTEN_OUT}",
                )
            owner[name] = layer.index


def _check_widths(student: MoEModel) -> None:
    """Narrowed experts need one width in all layers, and a name for it in the config."""
    widths = {la.index: _narrow_width(la) or la.intermediate_size for la in student.layers}
    first, width = next(iter(widths.items()))
    for index, other in widths.items():
        if other != width:
            raise _refusal(
                index,
                f"its experts have width {other} and those of layer {first} {width}, and a stock "
                f"config has one width for all; {WRITTEN_OUT}",
            )
    if width != student.layers[0].intermediate_size and _name_of_width(student, width) is None:
        raise _refusal(
            first,
            f"the config of the family has no entry that gives only routed experts the width "
            f"{width}; {WRITTEN_OUT}",
        )


def _check_mask(layer: MoELayer) -> None:
    """A stock router has no mask, so its rows must be such that they can be sliced instead."""
    groups = layer.num_groups
    if not isinstance(layer.router, MaskedRouter) or groups == 1:
        return
    size = layer.num_experts // groups
    kept = [sum(row // size == g for row in layer.selectable_rows) for g in range(groups)]
    if len(set(kept)) > 1 or kept[0] < 2:
        raise _refusal(
            layer.index,
            f"its masked router keeps {kept} rows in its {groups} groups, a stock router has no "
            "mask, and sliced rows must be equally many in each group, at least 2; use "
            "compressor.router=slice",
        )


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
    width = None if densify else _narrow_width(student.layers[0])
    if width is not None and (name := _name_of_width(student, width)):
        setattr(plain.config, name, width)
    for layer in plain.layers:
        layer.swap(_pick(layer.bank.as_stock(width), layer.selectable_rows))
        layer.unmask()
    set_expert_count(plain.config, plain.layers[0].num_experts)
    match_row_counts(plain.model)
    return plain


def _pick(experts: nn.Module, rows: tuple[int, ...]) -> nn.Module:
    if len(rows) == experts.num_experts:
        return experts
    picked = {n: p.detach()[list(rows)] for n, p in expert_parameters(experts).items()}
    return shell_of(experts, picked, len(rows))


def _narrow_width(layer: MoELayer) -> int | None:
    """Return the width of all experts of a narrowed layer, None where it is not one width.

    It is rounded up to what kernels ask for; channels of zeros are exact.
    """
    width = layer.bank.uniform
    return width and min(-(-width // _STEP) * _STEP, layer.intermediate_size)


def _name_of_width(student: MoEModel, width: int) -> str | None:
    """Return the config entry that gives routed experts this width and changes nothing else.

    It is that of the family's width of experts, unless shared experts or dense layers take theirs
    from it too.
    """
    for name in WIDTH_NAMES:
        if not isinstance(getattr(student.config, name, None), int):
            continue
        config = copy.deepcopy(student.config)
        setattr(config, name, width)
        with torch.device("meta"):
            built = MoEModel(type(student.model)(config))
        if {la.intermediate_size for la in built.layers} == {width} and _agree(built, student):
            return name
    return None


def _agree(built: MoEModel, student: MoEModel) -> bool:
    """Return whether all that is not routed has the same shapes in both."""
    experts = tuple(f"{layer.name}.experts." for layer in student.layers)
    state = {n: t.shape for n, t in student.model.state_dict().items() if not n.startswith(experts)}
    own = built.model.state_dict()
    return all(own[name].shape == shape for name, shape in state.items() if name in own)
