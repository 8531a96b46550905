"""What a repair trains: router rows, found by structure and held as float32 masters."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rerail.errors import InputError
from rerail.moe.layer import MoELayer, MoEModel


class _Cast(nn.Module):
    """Lets a float32 master act as a parameter of another dtype; the gradient flows through the cast."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)


def _trained(layer: MoELayer, trains: str) -> list[tuple[nn.Module, str]]:
    found = [layer.rows_owner()]
    if trains == "router_rows+bias":
        owner = found[0][0]
        if isinstance(getattr(owner, "bias", None), nn.Parameter):
            found.append((owner, "bias"))
    return found


@contextlib.contextmanager
def masters(student: MoEModel, trains: str) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the trainable parameters by name, and leave plain ones of the model's dtype behind.

    Each selected tensor is copied first, so that what the teacher shares is never trained; every
    other parameter of the student is frozen. In a bf16 model the copy is a float32 master, since
    steps of 5e-5 are below half an ulp of most bf16 router weights.

    Raises:
        InputError: gate weights of a layer are constant (top-1, renormalised), so nothing can learn.
    """
    for layer in student.layers:
        if layer.gates_are_constant():
            raise InputError(
                f"layer {layer.index} routes to top_k = 1 and renormalises, so its gate weights are always 1 and "
                "the KL has no gradient at the router; set distill=none or use a model with top_k > 1"
            )
    for parameter in student.model.parameters():
        parameter.requires_grad_(False)
    held: dict[str, nn.Parameter] = {}
    cast: list[tuple[nn.Module, str]] = []
    for layer in student.layers:
        for owner, name in _trained(layer, trains):
            old = getattr(owner, name)
            master = nn.Parameter(old.detach().float().clone(), requires_grad=True)
            owner._parameters[name] = master
            held[f"layers.{layer.index}.router.{name}"] = master
            if old.dtype != torch.float32:
                parametrize.register_parametrization(owner, name, _Cast(old.dtype), unsafe=True)
                cast.append((owner, name))
    try:
        yield held
    finally:
        for owner, name in cast:
            parametrize.remove_parametrizations(owner, name, leave_parametrized=True)
        for parameter in student.model.parameters():
            parameter.requires_grad_(False)
