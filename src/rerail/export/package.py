"""A student as a model of our own classes, which stores what its form stores and nothing else."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rerail.errors import InputError
from rerail.experts.base import ExpertBank, SolvedBank
from rerail.export.families import family_of, our_classes, stock_classes
from rerail.export.pools import Pool, pools_of
from rerail.export.stock import check_plain, is_whole_form, selectable_rows
from rerail.export.structure import stored_bank
from rerail.moe.families import traits_of
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer, MoEModel
from rerail.moe.router import MaskedRouter

VERSION = 1


class Form(NamedTuple):
    """What one layer stores.

    Attributes:
        entry: plain data, as `restructure` reads it.
        experts: stock tensors that the innermost bank reads, with `entry["experts"]` rows.
        solved: the other tensors of each bank, innermost first.
    """

    entry: dict[str, Any]
    experts: dict[str, Tensor]
    solved: list[dict[str, Tensor]]


def check_packaged(student: MoEModel, densify: bool = False) -> None:
    """Check that there is a family to build the stored structure on; reads no weight.

    Raises:
        InputError: transformers has no causal language model of this family and class, or a form
            has no plain experts to densify to.
    """
    family, found = family_of(student.config), type(student.model)
    known = stock_classes(family)
    if found not in (known.causal, our_classes(family).causal):
        raise InputError(
            f"export.form=package and remote build on {known.causal.__name__}, the class of the "
            f"family {family!r}, not on {found.__name__}; use export.form=native"
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
    empty = MoEModel(_on_meta(stock_classes(family).causal, config, plain)).layers
    forms = list(_forms(plain, empty))
    config.rerail = {"version": VERSION, "layers": [form.entry for form in forms]}
    made = _on_meta(our_classes(family).causal, config, plain)
    _fill(made, plain, forms, {layer.index: layer.experts for layer in empty})
    return MoEModel(made)


def _own_config(config_class: Any, held: Any) -> Any:
    fields = held.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "rerail", "auto_map"):
        fields.pop(name, None)
    config = config_class.from_dict(fields)
    for name in ("_attn_implementation", "_experts_implementation"):
        setattr(config, name, getattr(held, name, None))
    return config


def _on_meta(model_class: Any, config: Any, like: MoEModel) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(like.model.dtype)
    try:
        with torch.device("meta"):
            return model_class(config)
    finally:
        torch.set_default_dtype(before)


def _innermost(layer: MoELayer) -> MoELayer:
    """Return the layer as it is below the banks that wrap others."""
    experts = layer.experts
    if not (isinstance(experts, ExpertBank) and experts.wraps):
        return layer
    block = copy.copy(layer.block)
    inner = cast(nn.Module, experts.inner)
    block._modules = {**layer.block._modules, "experts": inner}
    return _innermost(MoELayer(layer.index, layer.name, block))


def _wrapping(experts: nn.Module) -> list[ExpertBank]:
    """Return the banks that wrap others, innermost first."""
    if isinstance(experts, ExpertBank) and experts.wraps:
        return [*_wrapping(cast(nn.Module, experts.inner)), experts]
    return []


def _forms(student: MoEModel, stock: Sequence[MoELayer]) -> Iterator[Form]:
    inner = [_innermost(layer) for layer in student.layers]
    pools = pools_of([layer for layer in inner if is_whole_form(layer.experts)])
    for layer, below, empty in zip(student.layers, inner, stock, strict=True):
        pool = pools.get(layer.index)
        changed = isinstance(layer.experts, ExpertBank) or (pool is not None and pool.shared)
        changed |= isinstance(layer.router, MaskedRouter)
        if changed or layer.num_experts != empty.num_experts:
            yield _form(layer, below, empty, pool, student.model)


def _form(layer: MoELayer, below: MoELayer, empty: MoELayer, pool: Pool | None, model: Any) -> Form:
    traits = traits_of(layer.block)
    assert traits is not None
    bank, wrapping = below.experts, _wrapping(layer.experts)
    if pool is not None:
        own: dict[str, Tensor] = {}
        slots, experts = pool.slots(below), pool.experts
        spec: dict[str, Any] = {"kind": "dense", "stored": pool.size, "integers": {}, "options": {}}
    else:
        assert isinstance(bank, ExpertBank)
        slots, experts, own, spec = _some(bank)
    solved = [own, *(_tensors(around) for around in wrapping)]
    specs = [spec, *(_spec(around) for around in wrapping)]
    masked = isinstance(layer.router, MaskedRouter)
    entry = {
        "layer": layer.index,
        "path": layer.name.removeprefix(f"{model.base_model_prefix}."),
        "router": traits.router,
        "built": empty.num_experts,
        "rows": layer.num_experts,
        "kept": list(selectable_rows(layer)) if masked else None,
        "slots": slots,
        "experts": len(next(iter(experts.values()))) if experts else len(slots),
        "whole": pool is not None,
        "pool": layer.index if pool is None else pool.owner,
        "banks": [
            {**one, "tensors": {n: [_dtype(t, model), list(t.shape)] for n, t in held.items()}}
            for one, held in zip(specs, solved, strict=True)
        ],
    }
    return Form(entry, experts, solved)


def _some(
    bank: ExpertBank,
) -> tuple[list[int], dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return slots, stock tensors, solved tensors and the spec of a form that solves for some.

    A form that reads experts of the layer names them in its integers as `kept`: they are stored
    alone, and are then the first of the layer.
    """
    spec, slots = _spec(bank), bank.slots.tolist()
    held = {n: p.detach() for n, p in expert_parameters(bank.shell).items()}
    if isinstance(bank, SolvedBank):
        spec["options"]["run"] = "lazy"
        held = {n: p for n, p in held.items() if n not in bank.touched(bank.spec)}
    if "kept" in bank.spec.integers:
        kept, own = list(bank.spec.each("kept")), cast(int, bank.shell.num_experts)
        held = {n: p[kept] for n, p in held.items()}
        place = {row: i for i, row in enumerate(kept)}
        slots = [place[r] if r < own else r - own + len(kept) for r in slots]
        spec["integers"]["kept"] = list(range(len(kept)))
    return slots, held, _tensors(bank), spec


def _spec(bank: ExpertBank) -> dict[str, Any]:
    spec = bank.spec
    integers = {n: list(v) if isinstance(v, tuple) else v for n, v in spec.integers.items()}
    options = dict(spec.options)
    return {"kind": spec.kind, "stored": spec.stored, "integers": integers, "options": options}


def _tensors(bank: ExpertBank) -> dict[str, Tensor]:
    """Return the solved tensors of a bank, Parameters or buffers, by their names in the plan."""
    names = bank.shapes(bank.spec, bank.dims)
    return {n: getattr(bank, n.replace(".", "_")).detach() for n in names}


def _dtype(tensor: Tensor, model: Any) -> str | None:
    """Return the dtype of a tensor by name, None where it is that of the model."""
    return None if tensor.dtype == model.dtype else str(tensor.dtype).removeprefix("torch.")


def _fill(
    made: Any, student: MoEModel, forms: Sequence[Form], stocks: Mapping[int, nn.Module]
) -> None:
    """Put the student's tensors into a model on the meta device, as the same objects."""
    state = dict(student.model.state_dict(keep_vars=True))
    shells: dict[int, nn.Module] = {}
    names = {layer.index: layer.name for layer in student.layers}
    for entry, experts, solved in forms:
        name = names[entry["layer"]]
        state = {n: t for n, t in state.items() if not n.startswith(f"{name}.experts.")}
        bank = stored_bank(entry, stocks[entry["layer"]], experts, solved, shells)
        state |= bank.state_dict(prefix=f"{name}.experts.", keep_vars=True)
        if entry["kept"] is not None:
            dropped = f"{name}.{entry['router']}.dropped"
            state[dropped] = student.model.get_buffer(dropped)
    made.load_state_dict(state, strict=True, assign=True)
    for name, buffer in student.model.named_buffers():
        if name not in state:
            owner, _, short = name.rpartition(".")
            made.get_submodule(owner)._buffers[short] = buffer
    made.generation_config = student.model.generation_config
    made.eval()
