"""A student as a model of our own classes, which stores what its form stores and nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from rerail.errors import InputError
from rerail.experts.base import StoredForm
from rerail.export.classes import family_of, our_classes, stock_classes
from rerail.export.native import check_plain
from rerail.export.pools import Pool, pools_of
from rerail.export.structure import VERSION, bank_entry, stored_bank
from rerail.moe.families import implementations, path_in_body, set_implementations
from rerail.moe.model import MoELayer, MoEModel
from rerail.moe.router import MaskedRouter


def check_packaged(student: MoEModel, densify: bool = False) -> None:
    """Check that there is a family to build the stored structure on; reads no weight.

    Raises:
        InputError: transformers has no causal language model of this family and class, or a form
            has no plain experts to densify to.
    """
    family, own = family_of(student.config), type(student.model)
    known = stock_classes(family)
    if own not in (known.causal, our_classes(family).causal):
        raise InputError(
            f"export.form=package and remote build on {known.causal.__name__}, the class of the "
            f"family {family!r}, not on {own.__name__}; use export.form=native"
        )
    if densify:
        check_plain(student)


def packaged_model(student: MoEModel, densify: bool = False) -> MoEModel:
    """Return the student as a model of our class, in its running dtype.

    Whole experts are written as the P that are stored, once each, also where several layers share
    them; solved tensors are written as they are and expand in every forward. What is not routed
    stays the student's own Parameter objects; the student is not touched.

    Args:
        student: what `apply_plan` returned, repaired or not.
        densify: turn every stored form into one whole expert for each router row.

    Raises:
        InputError: as `check_packaged`.
    """
    check_packaged(student, densify)
    plain = student.with_shared_parameters()
    if densify:
        for layer in plain.layers:
            layer.swap(layer.stock())
    family = family_of(student.config)
    config = _own_config(our_classes(family).config, plain.config)
    stock = MoEModel(_on_meta(stock_classes(family).causal, config, plain)).layers
    stored = list(_stored_layers(plain, stock))
    config.rerail = {"version": VERSION, "layers": [layer.entry for layer in stored]}
    packaged = _on_meta(our_classes(family).causal, config, plain)
    _fill(packaged, plain, stored, {layer.index: layer.experts for layer in stock})
    return MoEModel(packaged)


def _own_config(config_class: Any, stock: Any) -> Any:
    fields = stock.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "rerail", "auto_map"):
        fields.pop(name, None)
    config = config_class.from_dict(fields)
    set_implementations(config, implementations(stock))
    return config


def _on_meta(model_class: Any, config: Any, like: MoEModel) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(like.model.dtype)
    try:
        with torch.device("meta"):
            return model_class(config)
    finally:
        torch.set_default_dtype(before)


class _StoredLayer(NamedTuple):
    """What a checkpoint holds of a layer that differs from the stock model.

    Attributes:
        entry: plain data, as `restructure` reads it.
        forms: of the bank that answers and of those around it, innermost first.
    """

    entry: dict[str, Any]
    forms: list[StoredForm]


def _stored_layers(student: MoEModel, stock: Sequence[MoELayer]) -> Iterator[_StoredLayer]:
    nested = {layer.index: layer.bank.nested() for layer in student.layers}
    pools = pools_of({index: banks[0] for index, banks in nested.items() if banks[0].whole})
    for layer, built in zip(student.layers, stock, strict=True):
        pool = pools.get(layer.index)
        same = layer.bank.is_stock and layer.num_experts == built.num_experts
        same &= not isinstance(layer.router, MaskedRouter) and not (pool and pool.shared)
        if same:
            continue
        inner, *around = nested[layer.index]
        form = inner.stored_form() if pool is None else pool.stored_form(layer.index)
        forms = [form, *(bank.stored_form() for bank in around)]
        yield _StoredLayer(_entry(layer, built.num_experts, forms, pool, student.model), forms)


def _entry(
    layer: MoELayer, built: int, forms: Sequence[StoredForm], pool: Pool | None, model: Any
) -> dict[str, Any]:
    """Return what `restructure` must know of a layer."""
    slots, experts = forms[0].slots, forms[0].experts
    masked = isinstance(layer.router, MaskedRouter)
    return {
        "layer": layer.index,
        "path": path_in_body(model, layer.name),
        "router": layer.router_name,
        "built": built,
        "rows": layer.num_experts,
        "kept": list(layer.selectable_rows) if masked else None,
        "slots": slots,
        "experts": len(next(iter(experts.values()))) if experts else len(slots),
        "whole": pool is not None,
        "pool": layer.index if pool is None else pool.owner,
        "banks": [bank_entry(form, model.dtype) for form in forms],
    }


def _fill(
    packaged: Any,
    student: MoEModel,
    layers: Sequence[_StoredLayer],
    stocks: Mapping[int, nn.Module],
) -> None:
    """Put the student's tensors into a model on the meta device, as the same objects."""
    state = dict(student.model.state_dict(keep_vars=True))
    shells: dict[int, nn.Module] = {}
    names = {layer.index: layer.name for layer in student.layers}
    for entry, forms in layers:
        name = names[entry["layer"]]
        state = {n: t for n, t in state.items() if not n.startswith(f"{name}.experts.")}
        solved = [form.solved for form in forms]
        bank = stored_bank(entry, stocks[entry["layer"]], forms[0].experts, solved, shells)
        state |= bank.state_dict(prefix=f"{name}.experts.", keep_vars=True)
        if entry["kept"] is not None:
            dropped = f"{name}.{entry['router']}.dropped"
            state[dropped] = student.model.get_buffer(dropped)
    packaged.load_state_dict(state, strict=True, assign=True)
    for name, buffer in student.model.named_buffers():
        if name not in state:
            owner, _, short = name.rpartition(".")
            packaged.get_submodule(owner)._buffers[short] = buffer
    packaged.generation_config = student.model.generation_config
    packaged.eval()
