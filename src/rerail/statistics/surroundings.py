"""What stands around the experts of a layer: its router's logits and the residual stream."""

from typing import Any

import torch
from torch import Tensor, nn

from rerail.errors import OutOfReach
from rerail.moe.families import decoder_layer, reads_residual, returns_probabilities
from rerail.moe.model import MoELayer, MoEModel
from rerail.moe.router_scores import router_product, router_scores
from rerail.statistics.statistic import Need

_FROM_ROUTER = "router {} of {} cannot be measured: its router makes no tensor with one column for "
_UNMEASURED = {
    "logits": _FROM_ROUTER + "each of {} experts",
    "scores": _FROM_ROUTER + "each of {} experts",
    "residual": "the {} stream before {} cannot be measured: its input is not the output of a norm "
    "beside it in the decoder layer; allowed are other statistics",
}


class Surroundings:
    """Hooks on one layer that keep what its experts' statistics need, during one forward.

    Attributes:
        names: what they keep, of logits, scores and residual.
    """

    def __init__(self, model: MoEModel, layer: MoELayer, needs: frozenset[Need]):
        self.layer = layer
        self.names = [name for name in _UNMEASURED if name in needs]
        self._tensors: dict[str, Tensor | None] = {}
        self._passed: list[tuple[Any, Tensor]] = []
        self.hooks: list[Any] = []
        if needs & {"logits", "scores"}:
            hook = layer.router.register_forward_hook(self._routed, with_kwargs=True)
            self.hooks.append(hook)
        if "residual" in needs and reads_residual(layer.block):
            hook = layer.router.register_forward_pre_hook(self._read, with_kwargs=True)
            self.hooks.append(hook)
        elif "residual" in needs:
            self._watch_children(decoder_layer(model.model, layer.name))

    def _watch_children(self, decoder: nn.Module) -> None:
        for child in decoder.children():
            if child is not self.layer.block:
                hook = child.register_forward_hook(self._passed_child, with_kwargs=True)
                self.hooks.append(hook)
        block = self.layer.block.register_forward_pre_hook(self._entered, with_kwargs=True)
        self.hooks.append(block)

    def _routed(self, router: nn.Module, args: Any, named: Any, output: Any) -> None:
        experts = self.layer.num_experts
        if "logits" in self.names:
            self._tensors["logits"] = self._logits(router, args, named, output)
        if "scores" in self.names:
            self._tensors["scores"] = router_scores(router, args, named, experts)

    def _logits(self, router: nn.Module, args: Any, named: Any, output: Any) -> Tensor | None:
        parts = output if isinstance(output, tuple | list) else [output]
        experts = self.layer.num_experts
        own = next((p for p in parts if p is not None and p.shape[-1] == experts), None)
        if own is None or not returns_probabilities(self.layer.block):
            return own
        _, logits = router_product(router, args, named, experts)
        return logits if logits is None else logits.masked_fill(own == 0, -torch.inf)

    def _read(self, _module: nn.Module, args: Any, named: Any) -> None:
        self._tensors["residual"] = first_tensor(args, named)

    def _passed_child(self, _module: nn.Module, args: Any, named: Any, output: Any) -> None:
        if (entering := first_tensor(args, named)) is not None:
            self._passed.append((output, entering))

    def _entered(self, _module: nn.Module, args: Any, named: Any) -> None:
        entering = first_tensor(args, named)
        # by identity: the child whose very output enters is the norm, and it saw the residual
        before = [tensor for output, tensor in self._passed if output is entering]
        self._tensors["residual"] = before[-1] if before else None
        # tensors of this forward must not live until the next one
        self._passed.clear()

    def take(self) -> dict[str, Tensor]:
        """Return what this forward left, by name, each (T, E) or (T, H); it is forgotten here.

        Those are the router's logits, -inf where a mask silenced a slot; its scores, see
        `router_scores`; and the residual stream before the norm of the MoE sub-layer.

        Raises:
            OutOfReach: the router gives none, or the block's input is not the output of a module
                beside it.
        """
        tensors, self._tensors = self._tensors, {}
        taken: dict[str, Tensor] = {}
        for name in self.names:
            if (tensor := tensors.get(name)) is None:
                layer = self.layer
                raise OutOfReach(_UNMEASURED[name].format(name, layer.name, layer.num_experts))
            taken[name] = tensor.reshape(-1, tensor.shape[-1])
        return taken

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()


def first_tensor(args: Any, named: Any) -> Tensor | None:
    """Return the first tensor among positional and named arguments, None where there is none."""
    values = [v for v in (*args, *named.values()) if isinstance(v, Tensor)]
    return values[0] if values else None
