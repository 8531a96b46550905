"""What stands around the experts of a layer: its router's logits and the residual stream."""

from typing import Any

from torch import Tensor, nn

from rerail.errors import OutOfReach
from rerail.moe.families import decoder_layer
from rerail.moe.model import MoELayer, MoEModel
from rerail.moe.router_scores import router_scores
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
        self._hooks: list[Any] = []
        if needs & {"logits", "scores"}:
            hook = layer.router.register_forward_hook(self._routed, with_kwargs=True)
            self._hooks.append(hook)
        if "residual" in needs:
            self._watch_children(decoder_layer(model.model, layer.name))

    def _watch_children(self, decoder: nn.Module) -> None:
        for child in decoder.children():
            if child is not self.layer.block:
                hook = child.register_forward_hook(self._passed_child, with_kwargs=True)
                self._hooks.append(hook)
        block = self.layer.block.register_forward_pre_hook(self._entered, with_kwargs=True)
        self._hooks.append(block)

    def _routed(self, router: nn.Module, args: Any, named: Any, output: Any) -> None:
        experts = self.layer.num_experts
        if "logits" in self.names:
            parts = output if isinstance(output, tuple | list) else [output]
            logits = (p for p in parts if p is not None and p.shape[-1] == experts)
            self._tensors["logits"] = next(logits, None)
        if "scores" in self.names:
            self._tensors["scores"] = router_scores(router, args, named, experts)

    def _passed_child(self, _module: nn.Module, args: Any, named: Any, output: Any) -> None:
        if (entering := _first(args, named)) is not None:
            self._passed.append((output, entering))

    def _entered(self, _module: nn.Module, args: Any, named: Any) -> None:
        entering = _first(args, named)
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
        for hook in self._hooks:
            hook.remove()


def _first(args: Any, named: Any) -> Tensor | None:
    values = [v for v in (*args, *named.values()) if isinstance(v, Tensor)]
    return values[0] if values else None
