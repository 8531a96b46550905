"""The stored structure of a compressed model, put into a stock model that has just been built.

A model class of ours is a family's class with the mixin `Compressed`: the family's own `__init__`
builds the stock model (on the meta device under `from_pretrained`), then every layer that the
config's `rerail` entry names gets its router rows, its mask and its bank. What `from_pretrained`
then reads are the stored tensors themselves.

This file is part of every remote export, so it needs torch, `rerail.experts` and `rerail.moe` only.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rerail.errors import InputError
from rerail.experts.base import ExpertBank, StoredForm, build_bank
from rerail.export.entries import check_entries, check_entry, misfit, spec_of
from rerail.moe.attention import watch_attention
from rerail.moe.families import (
    body_of,
    experts_of,
    float32_patterns,
    match_row_counts,
    set_experts,
    top_k_of,
)
from rerail.moe.fused_experts import dims_of, expert_parameters, shell_of
from rerail.moe.router import MaskedRouter, slice_rows

Entry = Mapping[str, Any]
VERSION = 1


class Compressed:
    """Mixin for a family's model class: the stock model, then what `config.rerail` says."""

    def __init__(self, config: Any, *args: Any, **named: Any):
        super().__init__(config, *args, **named)  # type: ignore[call-arg]
        stored = getattr(config, "rerail", None)
        if not isinstance(stored, dict) or stored.get("version") != VERSION:
            raise InputError(
                f"config.rerail of {type(self).__name__} is not of version {VERSION}; fetch the "
                "checkpoint again"
            )
        restructure(self, stored.get("layers"))

    @classmethod
    def stock_class(cls) -> Any:
        """Return the family's own class."""
        return next(c for c in cls.__mro__ if c.__module__.startswith("transformers."))

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the file of a class, which is this one
        return bool(cls.stock_class()._can_set_experts_implementation())

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(cls.stock_class()._can_set_attn_implementation())


def restructure(model: Any, entries: Sequence[Entry]) -> None:
    """Give a stock model the rows, masks and banks that are stored, all of them still empty.

    Args:
        model: a transformers model, with or without a head.
        entries: one for each layer that differs from the stock model, with
            `layer`, `path` (of the block below the base model), `router` (its attribute);
            `built`, `rows` (router rows of the stock model, and stored ones);
            `kept` (rows that can be chosen, or None where the router has no mask);
            `slots`, `experts` (rows of the stock tensors that the innermost bank reads), `whole`
            (whether these are its stored experts), `pool` (the layer whose module holds them);
            `banks`, innermost first: `kind`, `stored`, `integers`, `options` of the spec, and
            `tensors` (dtype, or None for the model's, and shape of each solved tensor).
    """
    check_entries(entries)
    shells: dict[int, nn.Module] = {}
    for entry in entries:
        try:
            _restructure_layer(model, entry, shells)
        except InputError:
            raise
        except Exception as error:  # a form reads its sizes and words as it likes
            reason = f"cannot be built ({type(error).__name__}: {error})".splitlines()[0]
            raise misfit(entry, reason) from error
    match_row_counts(model)


def _restructure_layer(model: Any, entry: Entry, shells: dict[int, nn.Module]) -> None:
    body = body_of(model)
    block = body.get_submodule(entry["path"])
    stock, count = experts_of(block), entry["experts"]
    router = getattr(block, entry["router"])
    check_entry(entry, dims_of(stock), top_k_of(block, router))
    if entry["rows"] != entry["built"]:
        rows = range(entry["rows"])
        slice_rows(router, rows, entry["built"], recurse=True)
        slice_rows(block, rows, entry["built"], recurse=False)
    if entry["kept"] is not None:
        _mask(model, block, entry)
    fused = expert_parameters(stock).items()
    experts = {name: p.new_zeros((count, *p.shape[1:])) for name, p in fused}
    solved = [_empty(bank, next(iter(experts.values()))) for bank in entry["banks"]]
    set_experts(block, stored_bank(entry, stock, experts, solved, shells))
    watch_attention(body, {entry["path"]: block})


def bank_entry(form: StoredForm, dtype: torch.dtype) -> dict[str, Any]:
    """Return a bank as plain data: its spec, and dtype and shape of its solved tensors.

    Args:
        form: the bank.
        dtype: the model's, which is written as None.
    """
    spec = form.spec
    tensors = {
        name: [None if t.dtype == dtype else str(t.dtype).removeprefix("torch."), list(t.shape)]
        for name, t in form.solved.items()
    }
    integers = {n: list(v) if isinstance(v, tuple) else v for n, v in spec.integers.items()}
    options = dict(spec.options)
    return {
        "kind": spec.kind,
        "stored": spec.stored,
        "integers": integers,
        "options": options,
        "tensors": tensors,
    }


def _empty(bank: Entry, like: Tensor) -> dict[str, Tensor]:
    return {
        name: torch.zeros(
            shape, dtype=getattr(torch, dtype) if dtype else like.dtype, device=like.device
        )
        for name, (dtype, shape) in bank["tensors"].items()
    }


def stored_bank(
    entry: Entry,
    stock: nn.Module,
    experts: Mapping[str, Tensor],
    solved: Sequence[Mapping[str, Tensor]],
    shells: dict[int, nn.Module],
) -> ExpertBank:
    """Return the bank of an entry over given tensors.

    It also carries one number under the name of each stock tensor that it does not have: a family's
    own class, which would fill in random experts, finds tensors that do not fit and raises.

    Args:
        entry: what `restructure` reads.
        stock: the family's experts module, for its layout.
        experts: stock tensors; those that solved ones replace may be absent.
        solved: solved tensors of each bank.
        shells: modules that hold whole experts, by layer, for layers that share them; is added to.
    """
    layer = entry["pool"]  # equal for layers that share, so that what they share counts once
    banks: list[Any] = [_sized(stock, experts, solved[0], entry["experts"])]
    for part, tensors in zip(entry["banks"], solved, strict=True):
        spec = spec_of(part, layer, whole=entry["whole"] and len(banks) == 1)
        banks.append(build_bank(spec, entry["slots"], layer, {layer: banks[-1]}, tensors))
        if len(banks) == 2:
            _share(layer, banks[-1], shells)
    bank: ExpertBank = banks[-1]
    _keep_buffers(bank)
    for name in expert_parameters(stock):
        if not hasattr(bank, name):
            bank.register_buffer(name, bank.slots.new_zeros(1, dtype=torch.uint8))
    return bank


def _sized(
    stock: nn.Module, experts: Mapping[str, Tensor], solved: Mapping[str, Tensor], count: int
) -> nn.Module:
    """Return the stock module with `count` experts; absent tensors take no memory."""
    like = next(iter([*experts.values(), *solved.values()]))
    absent = {
        name: torch.zeros(1, dtype=p.dtype, device=like.device).expand(count, *p.shape[1:])
        for name, p in expert_parameters(stock).items()
        if name not in experts
    }
    return shell_of(stock, {**absent, **experts}, count)


def _share(pool: int, bank: ExpertBank, shells: dict[int, nn.Module]) -> None:
    """Let layers that share stored experts read one module."""
    owner = shells.setdefault(pool, bank.shell)
    if owner is not bank.shell:
        bank.shell = owner
        # transformers writes the tensors of a tied name once
        names = {f"shell.{n}": n for n in expert_parameters(owner)}
        bank._tied_weights_keys = names  # type: ignore[assignment]


def _keep_buffers(module: nn.Module) -> None:
    """Make every buffer part of the checkpoint: a model on the meta device has no other values."""
    for part in module.modules():
        for name in list(part._non_persistent_buffers_set):
            part.register_buffer(name, part.get_buffer(name).clone())


def _mask(model: Any, block: nn.Module, entry: Entry) -> None:
    name = entry["router"]
    router = getattr(block, name)
    masked = MaskedRouter(router, entry["kept"], entry["rows"])
    masked.register_buffer("dropped", masked.get_buffer("dropped"))
    setattr(block, name, masked)
    # what the family keeps in float32 now has a longer name
    for patterns in float32_patterns(model):
        names = [f"{entry['path']}.{name}.{n}" for n, _ in router.named_parameters()]
        wide = [n for n in names if any(re.search(pattern, n) for pattern in patterns)]
        patterns.update(n.replace(f".{name}.", f".{name}.inner.") for n in wide)
