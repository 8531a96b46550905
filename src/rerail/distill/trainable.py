"""What a repair trains: router rows, selected by structure, as float32 master copies."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.utils import parametrize

from rerail.errors import InputError
from rerail.moe.model import MoELayer, MoEModel


class _CastMaster(nn.Module):
    """Shows a float32 master in the dtype and on the device of the parameter that it replaces."""

    def __init__(self, replaced: Tensor):
        super().__init__()
        self.dtype, self.device = replaced.dtype, replaced.device

    def forward(self, master: Tensor) -> Tensor:
        if isinstance(master, DTensor):
            # `Partial`: each process adds the gradient of its own blocks, none holds the whole
            master = master.full_tensor(grad_placements=[Partial()])
        return master.to(self.device, self.dtype)


class _Master:
    """A float32 copy in the place of one parameter of one module.

    A parametrisation casts the copy wherever the module reads the parameter, so the family's own
    forward computes in the model's dtype while AdamW steps in float32.
    """

    def __init__(self, owner: nn.Module, name: str):
        self.owner, self.name = owner, name
        self.original: nn.Parameter = getattr(owner, name)
        self.parameter = nn.Parameter(self.original.detach().float().clone())
        owner._parameters[name] = self.parameter
        # unsafe: the cast changes the dtype, which parametrize refuses to do otherwise
        parametrize.register_parametrization(owner, name, _CastMaster(self.original), unsafe=True)

    def remove(self, keep: bool) -> None:
        """Put a plain parameter back: the master in the model's dtype, or the original."""
        parametrize.remove_parametrizations(self.owner, self.name, leave_parametrized=False)
        trained = nn.Parameter(self.parameter.detach().to(self.original), requires_grad=False)
        self.owner._parameters[self.name] = trained if keep else self.original


def select_parameters(layer: MoELayer, trains: str) -> list[tuple[nn.Module, str]]:
    """Return module and parameter name of what `trains` selects in a layer.

    The selection follows the layer's structure: a name that only sounds like a gate
    (`gate_up_proj`) never matches.

    Args:
        layer: an MoE layer.
        trains: `router_rows`, or `router_rows+bias` where the routers have a trained bias.
    """
    owner, rows = layer.rows_owner()
    selection = [(owner, rows)]
    # a correction bias (DeepSeek-V3) is a buffer: it has no gradient and is not selected
    if trains == "router_rows+bias" and isinstance(getattr(owner, "bias", None), nn.Parameter):
        selection.append((owner, "bias"))
    return selection


def check_router_gradients(model: MoEModel) -> None:
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
def master_copies(student: MoEModel, trains: str) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the trainable parameters by name, and leave plain ones of the model's dtype behind.

    Each selected tensor is copied first, so that what the teacher shares is never trained; every
    other parameter of the student is frozen. The copy is float32 whatever the model's dtype, since
    steps of 5e-5 are below half an ulp of most bf16 router weights. Where the block raises, the
    student keeps its old parameters.

    Args:
        student: the compressed model.
        trains: as in `select_parameters`.

    Yields:
        Parameters (rows (E, H), biases (E,)) named `layers.<index>.router.<parameter>`.

    Raises:
        InputError: as `check_router_gradients`.
    """
    check_router_gradients(student)
    # frozen experts cost no weight gradient; only the path from the first router is differentiated
    student.model.requires_grad_(False)
    copies = {
        f"layers.{layer.index}.router.{name}": _Master(owner, name)
        for layer in student.layers
        for owner, name in select_parameters(layer, trains)
    }
    keep = False
    try:
        yield {name: master.parameter for name, master in copies.items()}
        keep = True  # not reached where the block raises
    finally:
        for master in copies.values():
            master.remove(keep)
