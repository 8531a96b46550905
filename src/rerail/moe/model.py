"""A causal language model of transformers as MoE layers, a body and a head."""

from collections import ChainMap
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from rerail.errors import InputError
from rerail.experts.base import Stored
from rerail.moe.block import RoutedBlock
from rerail.moe.families import body_of, check_family, decoder_layers, is_moe_block, layer_number
from rerail.moe.fused_experts import Dims, ExpertWeights, Layout
from rerail.moe.head import head_logits
from rerail.moe.stand_in import copy_of_modules


@dataclass(frozen=True, eq=False)
class MoELayer(RoutedBlock):
    """A view of one MoE block in its model: its router, its experts and their sizes.

    Attributes:
        index: position of the decoder layer in the model.
        name: module path of the block.
        block: the module that owns router and experts.
    """

    index: int
    name: str
    block: nn.Module

    @property
    def dims(self) -> Dims:
        return self.bank.dims

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
    def layout(self) -> Layout:
        return self.bank.layout

    @property
    def fine_grained(self) -> bool:
        """True iff I <= H (design, section 2)."""
        return self.intermediate_size <= self.hidden_size

    def expert(self, slot: int) -> ExpertWeights:
        """Return the expert behind a router slot: gate, up (I, H) and down (H, I)."""
        return self.bank.materialise(slot)

    def stack(self) -> ExpertWeights:
        """Return all experts in slot order: gate, up (E, I, H) and down (E, H, I)."""
        return self.bank.stack()

    def stock(self) -> nn.Module:
        """Return the experts as a stock module: itself, or a plain copy of what a bank answers."""
        return self.bank.as_stock()

    def stored(self) -> Stored:
        return self.bank.stored()

    def stored_bits(self, width: int) -> Stored:
        return self.bank.stored_bits(width)

    def used(self, k: float) -> float:
        """Return the numbers of experts that are read for a token which k of them answer."""
        return self.bank.numbers_used(k)


def find_layers(model: nn.Module) -> tuple[MoELayer, ...]:
    """Return the MoE layers of a transformers model in the order of their depth.

    Raises:
        InputError: the model is dense, or its family stands outside the seam.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    check_family(family)
    layers: list[MoELayer] = []
    for path, module in model.named_modules():
        if is_moe_block(module):
            # a model whose path has no numbers has its MoE layers counted
            number = layer_number(path)
            layers.append(MoELayer(len(layers) if number is None else number, path, module))
            if not layers[-1].bank.is_fused:
                raise InputError(
                    f"model family {family!r} is not supported: its experts are not fused "
                    "`gate_up_proj` and `down_proj` tensors"
                )
            _check_rows(layers[-1], family)
    if not layers and any("expert" in name for name, _ in model.named_parameters()):
        raise InputError(
            f"model family {family!r} is not supported: it has experts, but no block that owns "
            "them and a router with one row for each"
        )
    if not layers:
        raise InputError(
            f"model family {family!r} has no MoE layers: rerail compresses routed experts"
        )
    return tuple(layers)


def _check_rows(layer: MoELayer, family: str) -> None:
    """A family's own router has one row for each routed expert, and none for anything else."""
    rows, experts = layer.num_experts, layer.dims.experts
    if layer.bank.is_stock and rows != experts:
        raise InputError(
            f"model family {family!r} is not supported: its router has {rows} rows for {experts} "
            "routed experts"
        )
    if not 1 <= layer.top_k <= rows:
        raise InputError(
            f"{layer.name} chooses {layer.top_k} experts for a token, and its router has {rows} "
            "rows; repair config.json"
        )


class MoEModel:
    """A transformers causal language model seen as MoE layers, a body and a head."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.layers = find_layers(model)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def fine_grained(self) -> bool:
        """True iff I <= H in the first MoE layer."""
        return self.layers[0].fine_grained

    def hidden(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the final hidden states (B, S, H), after the final norm, before the head."""
        # a mask that masks nothing may choose another attention kernel, with other roundings
        if mask is not None and bool(mask.all()):
            mask = None
        out = body_of(self.model)(
            input_ids=input_ids,
            attention_mask=None if mask is None else mask.long(),
            use_cache=False,
            return_dict=True,
        )
        return cast(Tensor, out.last_hidden_state)

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) by the model's own head, with its scale and soft cap."""
        return head_logits(self.model, hidden)

    def decoder_layers(self) -> list[nn.Module]:
        return decoder_layers(self.model, self.layers[0].name)

    def parameters_total(self) -> int:
        """Numbers that an export writes: shared and tied tensors once, banks by what they store.

        Persistent buffers (correction biases) count, as they lie in the checkpoint too.
        """
        # by identity, not by name: tied and shared tensors are one object under several names
        routed = {id(t) for layer in self.layers for t in _state(layer.experts)}
        rest = {id(t): t.numel() for t in _state(self.model) if id(t) not in routed}
        return sum(rest.values()) + self.parameters_routed()

    def parameters_routed(self) -> int:
        """Numbers in stored routed experts; one that several layers use counts once."""
        return sum(ChainMap(*(layer.stored() for layer in self.layers)).values())

    def bits_routed(self, width: int) -> int:
        """Bits of stored routed experts, where a dense number takes `width` of them."""
        return sum(ChainMap(*(layer.stored_bits(width) for layer in self.layers)).values())

    def parameters_active(self, chosen: float | None = None) -> int:
        """Numbers read for a token that `chosen` (K) experts a layer answer, others in full."""
        used = sum(layer.used(layer.top_k if chosen is None else chosen) for layer in self.layers)
        return self.parameters_total() - self.parameters_routed() + round(used)

    def with_shared_parameters(self) -> "MoEModel":
        """Return a copy with new modules and the very same Parameters and buffers."""
        return MoEModel(copy_of_modules(self.model))


def _state(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict(keep_vars=True).values())
