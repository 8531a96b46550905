"""MoE layers and models: the only file that touches attributes of transformers models."""

import copy
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from rerail.errors import InputError
from rerail.experts.base import ExpertBank, Stored
from rerail.moe.families import OUTSIDE_THE_SEAM, traits_of
from rerail.moe.fused_experts import Dims, ExpertWeights, Layout, dims_of, expert_parameters
from rerail.moe.head import head_logits
from rerail.moe.probe import Answering
from rerail.moe.router import MaskedRouter, gates_are_constant, rows_of, slice_rows


@dataclass(frozen=True, eq=False)
class MoELayer(Answering):
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
    def inner_router(self) -> nn.Module:
        """The family's own router, also below a mask."""
        return self.router.inner if isinstance(self.router, MaskedRouter) else self.router

    @property
    def router_rows(self) -> nn.Parameter:
        """The router's weight (E, H)."""
        owner, name = self.rows_owner()
        return cast(nn.Parameter, getattr(owner, name))

    def rows_owner(self) -> tuple[nn.Module, str]:
        """Return the module and the parameter name that hold the router's rows."""
        *path, name = _traits(self.block).rows.split(".")
        return self.inner_router.get_submodule(".".join(path)), name

    @property
    def num_experts(self) -> int:
        """E, the number of router rows."""
        return int(self.router_rows.shape[0])

    @property
    def top_k(self) -> int:
        """K, the experts chosen for a token."""
        for owner in (self.inner_router, self.block):
            if isinstance(k := getattr(owner, "top_k", None), int):
                return k
        return int(cast(Any, self.experts).config.num_experts_per_tok)

    @property
    def num_groups(self) -> int:
        """Groups of a group-limited router; 1 where routing is not grouped."""
        router = self.inner_router
        method = getattr(router, "topk_method", "group_limited_greedy")
        groups = getattr(router, "num_group", None) or getattr(router, "n_group", None)
        return int(groups) if groups and method != "greedy" else 1

    @property
    def top_k_groups(self) -> int:
        """Groups chosen for a token; 1 where routing is not grouped."""
        return int(getattr(self.inner_router, "topk_group", None) or 1)

    @property
    def least_per_group(self) -> int:
        """Selectable experts that a group needs: K in the chosen groups, and 2 to score a group."""
        if self.num_groups == 1:
            return self.top_k
        return max(2, -(-self.top_k // self.top_k_groups))

    @property
    def dims(self) -> Dims:
        """Sizes of the dense experts, whatever form they are stored in."""
        experts = self.experts
        return experts.dims if isinstance(experts, ExpertBank) else dims_of(experts)

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.dims.hidden

    @property
    def intermediate_size(self) -> int:
        """I, the width of one routed expert."""
        return self.dims.intermediate

    @property
    def expert_size(self) -> int:
        """Numbers in one dense expert, biases included."""
        return self.dims.expert

    @property
    def row_size(self) -> int:
        """Numbers that a checkpoint holds for one router row: the row and its biases."""
        owners = [(self.inner_router, True), (self.block, False)]
        rows = [r for m, deep in owners for r in rows_of(m, self.num_experts, recurse=deep)]
        return sum(tensor.numel() // self.num_experts for _, _, tensor, _ in rows)

    @property
    def layout(self) -> Layout:
        """How the family fuses its tensors."""
        experts = self.experts
        return experts.layout if isinstance(experts, ExpertBank) else Layout.of(experts)

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

    def stock(self) -> nn.Module:
        """Return the experts as a stock module: itself, or a plain copy of what a bank answers."""
        return self.experts.as_stock() if isinstance(self.experts, ExpertBank) else self.experts

    def stored(self) -> Stored:
        """Return the numbers of each stored expert (or solved tensor) by name."""
        whole: Stored = {((self.index, e, 1.0),): self.expert_size for e in range(self.num_experts)}
        return self.experts.stored() if isinstance(self.experts, ExpertBank) else whole

    def used(self, k: float) -> float:
        """Return the numbers of experts that are read for a token which k of them answer."""
        held = self.experts
        return held.numbers_used(k) if isinstance(held, ExpertBank) else k * self.expert_size

    def stored_bits(self, width: int) -> Stored:
        """Return the bits of each stored expert (or solved tensor) by name."""
        bits = {key: n * width for key, n in self.stored().items()}
        return self.experts.stored_bits(width) if isinstance(self.experts, ExpertBank) else bits

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

    def gates_are_constant(self) -> bool:
        """Return whether gate weights never change (top-1, renormalised): rows get no gradient."""
        return self.top_k == 1 and gates_are_constant(self.inner_router, self.hidden_size)


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
    found: list[MoELayer] = []
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
        """Return logits (..., V) by the model's own head, with its scale and soft cap."""
        return head_logits(self.model, hidden)

    def parameters_total(self) -> int:
        """Numbers that an export writes: shared and tied tensors once, banks by what they store.

        Persistent buffers (correction biases) count, as they lie in the checkpoint too.
        """
        routed = {id(t) for layer in self.layers for t in _state(layer.experts)}
        rest = {id(t): t.numel() for t in _state(self.model) if id(t) not in routed}
        return sum(rest.values()) + self.parameters_routed()

    def parameters_routed(self) -> int:
        """Numbers in stored routed experts; one that several layers use counts once."""
        stored: Stored = {}
        for layer in self.layers:
            stored |= layer.stored()
        return sum(stored.values())

    def bits_routed(self, width: int) -> int:
        """Bits of stored routed experts, where a dense number takes `width` of them."""
        stored: Stored = {}
        for layer in self.layers:
            stored |= layer.stored_bits(width)
        return sum(stored.values())

    def parameters_active(self, chosen: float | None = None) -> int:
        """Numbers read for a token that `chosen` (K) experts a layer answer, others in full."""
        used = sum(layer.used(layer.top_k if chosen is None else chosen) for layer in self.layers)
        return self.parameters_total() - self.parameters_routed() + round(used)

    def with_shared_parameters(self) -> "MoEModel":
        """Return a copy with new modules and the very same Parameters and buffers."""
        memo: dict[int, Any] = {id(p): p for p in self.model.parameters()}
        memo |= {id(b): b for b in self.model.buffers()}
        return MoEModel(copy.deepcopy(self.model, memo))


def _state(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict(keep_vars=True).values())
