"""MoE layers and models as rerail sees them: the only file that touches attributes of transformers models."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from rerail.errors import InputError
from rerail.moe.bank import ExpertBank, ExpertWeights, Layout, expert_parameters
from rerail.moe.router import MaskedRouter, slice_rows
from rerail.moe.traits import OUTSIDE_THE_SEAM, traits_of


@dataclass(frozen=True, eq=False)
class MoELayer:
    """A view of one MoE block: its router, its experts and their sizes.

    Attributes:
        index: position of the decoder layer in the model.
        name: module path of the block.
        block: the module that owns router and experts.
    """

    index: int
    name: str
    block: nn.Module

    @property
    def experts(self) -> nn.Module:
        """The stock experts module, or the bank that replaced it."""
        return cast(nn.Module, self.block.experts)

    @property
    def router(self) -> nn.Module:
        """The module that scores experts."""
        return cast(nn.Module, getattr(self.block, _traits(self.block).router))

    @property
    def router_rows(self) -> nn.Parameter:
        """The router's weight (E, H)."""
        owner, name = self.rows_owner()
        return cast(nn.Parameter, getattr(owner, name))

    @router_rows.setter
    def router_rows(self, rows: nn.Parameter) -> None:
        owner, name = self.rows_owner()
        owner._parameters[name] = rows

    def rows_owner(self) -> tuple[nn.Module, str]:
        """Return the module and the parameter name that hold the router's rows."""
        *path, name = _traits(self.block).rows.split(".")
        router = self.router.inner if isinstance(self.router, MaskedRouter) else self.router
        return cast(nn.Module, router).get_submodule(".".join(path)), name

    @property
    def num_experts(self) -> int:
        """E, the number of router rows."""
        return int(self.router_rows.shape[0])

    @property
    def top_k(self) -> int:
        """K, the experts chosen for a token."""
        for owner in (self.router, self.block):
            if isinstance(k := getattr(owner, "top_k", None), int):
                return k
        return int(self.experts.config.num_experts_per_tok)  # type: ignore[union-attr]

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.router_rows.shape[1])

    @property
    def intermediate_size(self) -> int:
        """I, the width of one routed expert."""
        shell = self.experts.shell if isinstance(self.experts, ExpertBank) else self.experts
        down = cast(Tensor, cast(nn.Module, shell).down_proj)
        return int(down.shape[-2] if self.layout.transposed else down.shape[-1])

    @property
    def num_groups(self) -> int:
        """Groups of a group-limited router; 1 where routing is not grouped."""
        method = getattr(self.router, "topk_method", "group_limited_greedy")
        groups = getattr(self.router, "num_group", None) or getattr(self.router, "n_group", None)
        return int(groups) if groups and method != "greedy" else 1

    @property
    def top_k_groups(self) -> int:
        """Groups chosen for a token; 1 where routing is not grouped."""
        return int(getattr(self.router, "topk_group", None) or 1)

    @property
    def layout(self) -> Layout:
        """How the family fuses its tensors."""
        return (
            self.experts.layout if isinstance(self.experts, ExpertBank) else Layout.of(self.experts)
        )

    @property
    def fine_grained(self) -> bool:
        """True iff I <= H (design, section 2)."""
        return self.intermediate_size <= self.hidden_size

    def expert(self, slot: int) -> ExpertWeights:
        """Return the expert behind a router slot: gate, up (I, H) and down (H, I)."""
        if isinstance(self.experts, ExpertBank):
            return self.experts.materialise(slot)
        held = expert_parameters(self.experts)
        return self.layout.unpack(held["gate_up_proj"][slot], held["down_proj"][slot])

    def stack(self) -> ExpertWeights:
        """Return all experts in slot order: gate, up (E, I, H) and down (E, H, I)."""
        if isinstance(self.experts, ExpertBank):
            dense = {n: t[self.experts.slots] for n, t in self.experts.dense().items()}
        else:
            dense = dict(expert_parameters(self.experts))
        return self.layout.unpack(dense["gate_up_proj"], dense["down_proj"])

    def expert_size(self) -> int:
        """Numbers in one dense expert, biases included."""
        shell = self.experts.shell if isinstance(self.experts, ExpertBank) else self.experts
        return sum(p[0].numel() for p in expert_parameters(cast(nn.Module, shell)).values())

    def stored_parameters(self) -> int:
        """Numbers that an export of this layer's routed experts writes."""
        if isinstance(self.experts, ExpertBank):
            return self.experts.stored_parameters()
        return self.expert_size() * self.num_experts

    def swap(self, bank: nn.Module) -> None:
        """Put a bank in the place of the experts."""
        self.block.experts = bank

    def keep_rows(self, kept: tuple[int, ...]) -> None:
        """Keep only these router rows (and correction biases), in place."""
        experts = self.num_experts
        slice_rows(self.router, kept, experts, recurse=True)
        slice_rows(self.block, kept, experts, recurse=False)

    def mask_rows(self, kept: tuple[int, ...]) -> None:
        """Keep all router rows but never select the others."""
        masked = MaskedRouter(self.router, kept, self.num_experts)
        setattr(self.block, _traits(self.block).router, masked)

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen slots (T, K) and gate weights (T, K) for hidden states (T, H)."""
        _, weights, index = self.router(hidden)
        return index, weights

    def gates_are_constant(self) -> bool:
        """Return whether gate weights never change (top-1, renormalised): no gradient reaches the rows.

        On the meta device a random copy of the router answers.
        """
        if self.top_k > 1:
            return False
        router = copy.deepcopy(self.router).to_empty(device="cpu").float()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in [*router.parameters(), *router.buffers()]:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            _, weights, _ = router(torch.randn(8, self.hidden_size, generator=generator))
        return bool(torch.allclose(weights, weights.flatten()[0].expand_as(weights)))


def _traits(block: nn.Module) -> Any:
    traits = traits_of(block)
    assert traits is not None
    return traits


def _inside_the_seam(experts: object) -> bool:
    if isinstance(experts, ExpertBank):
        return True
    parts = [getattr(experts, n, None) for n in ("gate_up_proj", "down_proj")]
    return all(isinstance(p, Tensor) and p.dim() == 3 for p in parts)


def find_layers(model: nn.Module) -> tuple[MoELayer, ...]:
    """Return the MoE layers of a transformers model in the order of their depth.

    Raises:
        InputError: the model is dense, or its family stands outside the seam.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family in OUTSIDE_THE_SEAM:
        raise InputError(f"model family {family!r} is not supported: {OUTSIDE_THE_SEAM[family]}")
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "experts") and traits_of(module) is not None:
            if not _inside_the_seam(module.experts):
                raise InputError(
                    f"model family {family!r} is not supported: its experts are not fused "
                    "`gate_up_proj` and `down_proj` tensors"
                )
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            found.append(MoELayer(numbers[0] if numbers else len(found), name, module))
    if not found:
        raise InputError(
            f"model family {family!r} has no MoE layers: rerail compresses routed experts"
        )
    return tuple(found)


class MoEModel:
    """A transformers causal language model seen as MoE layers, a body and a head."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.layers = find_layers(model)

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.model.config

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.config.vocab_size)

    @property
    def fine_grained(self) -> bool:
        """True iff I <= H in the first MoE layer."""
        return self.layers[0].fine_grained

    def hidden(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the final hidden states (B, S, H), after the final norm, before the head."""
        if mask is not None and bool(mask.all()):
            mask = None
        out = self.model.base_model(
            input_ids=input_ids,
            attention_mask=None if mask is None else mask.long(),
            use_cache=False,
            return_dict=True,
        )
        return cast(Tensor, out.last_hidden_state)

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) by the model's own head, with whatever scale and soft cap it has.

        The model's own forward runs with its body replaced by the given states, so that no family
        needs a row of its own here.
        """
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        with _body_returns(self.model, flat):
            dummy = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
            out = self.model(input_ids=dummy, use_cache=False, return_dict=True)
        return cast(Tensor, out.logits).reshape(*hidden.shape[:-1], -1)

    def parameters_total(self) -> int:
        """Numbers that an export writes: shared and tied tensors once, banks by what they store."""
        routed = {id(p) for layer in self.layers for p in layer.experts.parameters()}
        rest = {id(p): p.numel() for p in self.model.parameters() if id(p) not in routed}
        return sum(rest.values()) + self.parameters_routed()

    def parameters_routed(self) -> int:
        """Numbers in stored routed experts."""
        return sum(layer.stored_parameters() for layer in self.layers)

    def parameters_active(self) -> int:
        """Numbers used for one token: everything but routed experts, plus K dense experts a layer."""
        active = sum(layer.top_k * layer.expert_size() for layer in self.layers)
        return self.parameters_total() - self.parameters_routed() + active

    def with_shared_parameters(self) -> "MoEModel":
        """Return a copy whose modules are new and whose Parameters and buffers are the same objects."""
        memo: dict[int, Any] = {id(p): p for p in self.model.parameters()}
        memo |= {id(b): b for b in self.model.buffers()}
        return MoEModel(copy.deepcopy(self.model, memo))


@contextlib.contextmanager
def _body_returns(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    body = model.base_model

    def forward(*_: Any, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=hidden)

    body.forward = forward
    before = model.config.__dict__.get("output_router_logits")
    if before:
        model.config.output_router_logits = False
    try:
        yield
    finally:
        del body.forward
        if before:
            model.config.output_router_logits = before
