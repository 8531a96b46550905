"""What a repair trains: router rows, found by structure and held as float32 masters."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.utils import parametrize

from rerail.errors import InputError
from rerail.moe.model import MoELayer, MoEModel


class _Cast(nn.Module):
    """Lets a master act as a parameter of another dtype or device; the gradient flows through."""

    def __init__(self, like: Tensor):
        super().__init__()
        self.dtype, self.place = like.dtype, like.device

    def forward(self, master: Tensor) -> Tensor:
        if isinstance(master, DTensor):  # every process adds the gradient of its own blocks
            master = master.full_tensor(grad_placements=[Partial()])
        return master.to(self.place, self.dtype)


class _Master:
    """A float32 copy that stands in for one parameter of one module."""

    def __init__(self, owner: nn.Module, name: str):
        self.owner, self.name = owner, name
        self.old: nn.Parameter = getattr(owner, name)
        self.parameter = nn.Parameter(self.old.detach().float().clone())
        owner._parameters[name] = self.parameter
        parametrize.register_parametrization(owner, name, _Cast(self.old), unsafe=True)

    def leave(self, keep: bool) -> None:
        """Put a plain parameter back: the master in the model's dtype, or the old one."""
        parametrize.remove_parametrizations(self.owner, self.name, leave_parametrized=False)
        new = nn.Parameter(self.parameter.detach().to(self.old), requires_grad=False)
        self.owner._parameters[self.name] = new if keep else self.old


def selected(layer: MoELayer, trains: str) -> list[tuple[nn.Module, str]]:
    """Return module and parameter name of what `trains` selects in a layer.

    Selected by identity: a name that only sounds like a gate (`gate_up_proj`) never is.

    Args:
        layer: an MoE layer.
        trains: `router_rows`, or `router_rows+bias` where the routers have a trained bias.
    """
    owner, rows = layer.rows_owner()
    found = [(owner, rows)]
    if trains == "router_rows+bias" and isinstance(getattr(owner, "bias", None), nn.Parameter):
        found.append((owner, "bias"))
    return found


def check_gates(model: MoEModel) -> None:
    """Check that the KL has a gradient at every router.

    Raises:
        InputError: gate weights of a layer are constant (top-1, renormalised).
    """
    for layer in model.layers:
        if layer.gates_are_constant():
            raise InputError(
                f"layer {layer.index} routes to top_k = 1 and renormalises, so its gate weights "
                "are always 1 and the KL has no gradient at the router; set distill=none or use a "
                "model with top_k > 1"
            )


@contextlib.contextmanager
def masters(student: MoEModel, trains: str) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the trainable parameters by name, and leave plain ones of the model's dtype behind.

    Each selected tensor is copied first, so that what the teacher shares is never trained; every
    other parameter of the student is frozen. The copy is float32 whatever the model's dtype, since
    steps of 5e-5 are below half an ulp of most bf16 router weights. Where the block raises, the
    student keeps its old parameters.

    Raises:
        InputError: as `check_gates`.
    """
    check_gates(student)
    student.model.requires_grad_(False)
    held = {
        f"layers.{layer.index}.router.{name}": _Master(owner, name)
        for layer in student.layers
        for owner, name in selected(layer, trains)
    }
    keep = False
    try:
        yield {name: master.parameter for name, master in held.items()}
        keep = True
    finally:
        for master in held.values():
            master.leave(keep)
