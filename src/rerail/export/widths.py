"""Experts that were narrowed to one width, a form for which a stock config may have a name.

The name is that of the family's width of experts, unless shared experts or dense layers take theirs
from it too.
"""

import copy
from typing import Any, cast

import torch
from torch import nn

from rerail.moe.fused_experts import expert_parameters, shell_of
from rerail.moe.model import MoELayer, MoEModel

NAMES = ("moe_intermediate_size", "intermediate_size")
_STEP = 8  # numbers of 2 bytes in a row of 16 bytes, which the kernels of transformers ask for


def narrowed_width(layer: MoELayer) -> int | None:
    """Return the width of all experts of a narrowed layer, None where it is not one width.

    It is rounded up to what kernels ask for; channels of zeros are exact.
    """
    width = cast(int | None, getattr(layer.experts, "uniform", None))
    return width and min(-(-width // _STEP) * _STEP, layer.intermediate_size)


def narrow_stock(layer: MoELayer) -> nn.Module:
    """Return the experts of a narrowed layer as a stock module, one for each router row."""
    bank: Any = layer.experts
    touched = bank.touched(bank.spec)
    kept = {n: p for n, p in expert_parameters(bank.shell).items() if n not in touched}
    with torch.no_grad():
        fused = {**kept, **bank.fused(narrowed_width(layer))}
        rows = {name: tensor.detach()[bank.slots] for name, tensor in fused.items()}
    return shell_of(bank.shell, rows, len(bank.slots))


def name_of_width(student: MoEModel, width: int) -> str | None:
    """Return the config entry that gives routed experts this width and changes nothing else."""
    for name in NAMES:
        if not isinstance(getattr(student.config, name, None), int):
            continue
        config = copy.deepcopy(student.config)
        setattr(config, name, width)
        with torch.device("meta"):
            built = MoEModel(type(student.model)(config))
        if {la.intermediate_size for la in built.layers} == {width} and _agree(built, student):
            return name
    return None


def _agree(built: MoEModel, student: MoEModel) -> bool:
    """Return whether all that is not routed has the same shapes in both."""
    experts = tuple(f"{layer.name}.experts." for layer in student.layers)
    held = {n: t.shape for n, t in student.model.state_dict().items() if not n.startswith(experts)}
    own = built.model.state_dict()
    return all(own[name].shape == shape for name, shape in held.items() if name in own)
