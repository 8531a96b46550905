"""What stands around the experts of a layer: its router's logits and the residual stream."""

from typing import Any

import torch
from torch import Tensor, nn

from rerail.errors import OutOfReach
from rerail.moe.families import decoder_layer, reads_residual, returns_probabilities
from rerail.moe.model import MoELayer, MoEModel
from rerail.moe.router_scores import router_logits, router_scores
from rerail.statistics.statistic import Need


class Surroundings:
    """Hooks on one layer that hold what its experts' statistics need, during one forward."""

    def __init__(self, model: MoEModel, layer: MoELayer, needs: frozenset[Need]):
        self.layer = layer
        self._logits: Tensor | None = None
        self._scores: Tensor | None = None
        self._residual: Tensor | None = None
        self._passed: list[tuple[Any, Tensor]] = []
        self._hooks: list[Any] = []
        if "logits" in needs:
            hook = layer.router.register_forward_hook(self._routed, with_kwargs=True)
            self._hooks.append(hook)
        if "scores" in needs:
            hook = layer.router.register_forward_hook(self._scored, with_kwargs=True)
            self._hooks.append(hook)
        if "residual" in needs and reads_residual(layer.block):
            hook = layer.router.register_forward_pre_hook(self._read, with_kwargs=True)
            self._hooks.append(hook)
        elif "residual" in needs:
            self._watch_children(decoder_layer(model.model, layer.name))

    def _watch_children(self, decoder: nn.Module) -> None:
        for child in decoder.children():
            if child is not self.layer.block:
                hook = child.register_forward_hook(self._passed_child, with_kwargs=True)
                self._hooks.append(hook)
        block = self.layer.block.register_forward_pre_hook(self._entered, with_kwargs=True)
        self._hooks.append(block)

    def _routed(self, router: nn.Module, args: Any, named: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple | list) else [output]
        experts = self.layer.num_experts
        own = next((p for p in parts if p is not None and p.shape[-1] == experts), None)
        if own is not None and returns_probabilities(self.layer.block):
            logits = router_logits(router, args, named, experts)
            own = logits if logits is None else logits.masked_fill(own == 0, -torch.inf)
        self._logits = own

    def _scored(self, router: nn.Module, args: Any, named: Any, _output: Any) -> None:
        self._scores = router_scores(router, args, named, self.layer.num_experts)

    def _passed_child(self, _module: nn.Module, args: Any, named: Any, output: Any) -> None:
        if (entering := _first(args, named)) is not None:
            self._passed.append((output, entering))

    def _read(self, _module: nn.Module, args: Any, named: Any) -> None:
        self._residual = _first(args, named)

    def _entered(self, _module: nn.Module, args: Any, named: Any) -> None:
        entering = _first(args, named)
        # by identity: the child whose very output enters is the norm, and it saw the residual
        before = [tensor for output, tensor in self._passed if output is entering]
        self._residual = before[-1] if before else None
        # tensors of this forward must not live until the next one
        self._passed.clear()

    def logits(self) -> Tensor:
        """Return this forward's router logits (T, E), -inf where a mask silenced a slot.

        Raises:
            OutOfReach: the router gives none.
        """
        if self._logits is None:
            raise OutOfReach(
                f"router logits of {self.layer.name} cannot be measured: its router returns no "
                f"tensor with one column for each of {self.layer.num_experts} experts"
            )
        logits, self._logits = self._logits, None
        return logits.reshape(-1, logits.shape[-1])

    def scores(self) -> Tensor:
        """Return this forward's scores (T, E), see `router_scores`.

        Raises:
            OutOfReach: the router makes none.
        """
        if self._scores is None:
            raise OutOfReach(
                f"router scores of {self.layer.name} cannot be measured: its router makes no "
                f"tensor with one column for each of {self.layer.num_experts} experts"
            )
        scores, self._scores = self._scores, None
        return scores

    def residual(self) -> Tensor:
        """Return this forward's residual stream (T, H) before the norm of the MoE sub-layer.

        Raises:
            OutOfReach: the block's input is not the output of a module beside it.
        """
        if self._residual is None:
            raise OutOfReach(
                f"the residual stream before {self.layer.name} cannot be found: its input is not "
                "the output of a norm beside it in the decoder layer; allowed are other statistics"
            )
        residual, self._residual = self._residual, None
        return residual.reshape(-1, residual.shape[-1])

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _first(args: Any, named: Any) -> Tensor | None:
    values = [v for v in (*args, *named.values()) if isinstance(v, Tensor)]
    return values[0] if values else None
