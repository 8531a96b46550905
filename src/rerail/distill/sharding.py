"""FSDP2: a student spread over processes, each with its part of every decoder layer.

Sharded are the frozen parameters that belong to exactly one decoder layer (attention, norms, stored
experts), and the masters. Whole on every process stay embeddings, final norm and head (the KL calls
the head on its own), buffers, and tensors that several decoder layers read.
"""

import copy
from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import parametrize

from rerail.moe.model import MoEModel


def private_copy(student: MoEModel) -> MoEModel:
    """Return a copy with Parameters and buffers of its own, on the same storage for now.

    Moving or sharding the copy leaves student and teacher as and where they are.
    """
    model = student.model
    # deepcopy takes what the memo has for a copy: new Parameters, which see the same storage
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().contiguous(), requires_grad=False)
        for p in model.parameters()
    }
    memo |= {id(b): b.detach() for b in model.buffers()}
    return MoEModel(copy.deepcopy(model, memo))


def shard_student(student: MoEModel, masters: nn.ParameterDict, mesh: Any) -> None:
    """Spread a private copy of a student, and its masters, over a mesh of processes, in place."""
    layers = student.decoder_layers()
    # FSDP2 gathers a layer's parameters for its own forward only, so what another layer or another
    # module reads too must stay whole: count the readers, and the names inside layers and in all
    readers = Counter(id(p) for layer in layers for p in layer.parameters())
    names = Counter(id(p) for _, p in student.model.named_parameters(remove_duplicate=False))
    inside = Counter(id(p) for la in layers for _, p in la.named_parameters(remove_duplicate=False))
    _distribute(student.model, masters, mesh)
    for layer in layers:
        not_sharded = {
            p
            for p in layer.parameters()
            if isinstance(p, DTensor)
            or p.dim() == 0  # FSDP2 cuts the first axis, which a scalar lacks
            or readers[id(p)] > 1
            or names[id(p)] > inside[id(p)]
        }
        fully_shard(layer, mesh=mesh, ignored_params=not_sharded)
    student.model.to(_device_of(mesh))  # type: ignore[arg-type]


def _device_of(mesh: Any) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def _distribute(model: nn.Module, masters: nn.ParameterDict, mesh: Any) -> None:
    """Cut the masters by rows, here and where they stand in for the model's own parameters."""
    new = {}
    for name, master in masters.items():
        local = distribute_tensor(master.detach(), mesh, [Shard(0)])
        new[id(master)] = masters[name] = nn.Parameter(local)
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for entry in cast(Any, module.parametrizations).values():
                entry.original = new.get(id(entry.original), entry.original)


def full_copy(tensor: Tensor) -> Tensor:
    """Return a detached copy, gathered from all processes where it is sharded."""
    detached = tensor.detach()
    return detached.full_tensor().clone() if isinstance(detached, DTensor) else detached.clone()


def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor into one that may be sharded, in place."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
