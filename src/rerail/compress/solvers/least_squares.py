"""Least squares on sampled inputs: down projections that answer as several experts do."""

import torch
from torch import Tensor

from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer

_CHUNK = 1024


def channel_activations(layer: MoELayer, expert: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """Return act(gate) * up of one expert (fused tensors (1, ...)): inputs (n, H) -> (n, I).

    The family's own module computes, under down projections that pick up to H channels each.
    """
    hidden, width = layer.hidden_size, layer.intermediate_size
    first, parts = torch.zeros(len(inputs), 1, dtype=torch.int64, device=inputs.device), []
    for begin in range(0, width, hidden):
        taken = min(hidden, width - begin)
        pick = inputs.new_zeros(1, hidden, width)
        pick[0, range(taken), range(begin, begin + taken)] = 1
        fused = {**expert, "down_proj": pick.mT.contiguous() if layer.layout.transposed else pick}
        activations = layer.run(inputs, first, torch.ones_like(inputs[:, :1]), **_unbiased(fused))
        parts.append(activations[:, :taken])
    return torch.cat(parts, dim=1)


def normal_equations(
    layer: MoELayer,
    members: Tensor,
    shares: Tensor,
    merged: dict[str, Tensor],
    inputs: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return G = P P^T (I, I) and C = Y P^T (H, I) in float64; down biases are left out.

    Args:
        layer: holds the experts.
        members: int64 (m,), the slots whose outputs are added.
        shares: (m,), b_e of Y = sum_e b_e E_e(X).
        merged: fused tensors (1, ...) of the expert whose activations are P.
        inputs: X, (n, H), in the dtype to compute in.
        scale: (n,), factor of each input's column of P and Y.
    """
    stock = expert_parameters(layer.stock())
    own = _unbiased({n: p.detach()[members.to(p.device)].to(inputs) for n, p in stock.items()})
    index, weights = torch.arange(len(members), device=inputs.device), shares.to(inputs)
    width, hidden = layer.intermediate_size, layer.hidden_size
    gram = torch.zeros(width, width, dtype=torch.float64, device=inputs.device)
    cross = torch.zeros(hidden, width, dtype=torch.float64, device=inputs.device)
    for begin in range(0, len(inputs), _CHUNK):
        x, factor = inputs[begin : begin + _CHUNK], scale[begin : begin + _CHUNK]
        rows = [t.expand(len(x), -1).contiguous() for t in (index, weights)]
        outputs = layer.run(x, rows[0], rows[1], **own).double() * factor.double().unsqueeze(1)
        p = channel_activations(layer, merged, x).double() * factor.double().unsqueeze(1)
        gram += p.mT @ p
        cross += outputs.mT @ p
    return gram, cross


def ridge_solution(gram: Tensor, cross: Tensor, average: Tensor, ridge: float) -> Tensor:
    """Return (C + r g A)(G + r g 1)^-1 with g the mean of diag G, float64 (H, I).

    Where no input excites a direction, the average A stays; r = 0 gives the limit r -> 0. Where
    float32 noise in G is above r g, more is added.
    """
    average = average.double()
    missing = cross - average @ gram
    level = ridge * float(gram.diagonal().mean())
    if not gram.any():
        return average
    if level == 0:
        return torch.add(average, missing @ torch.linalg.pinv(gram, hermitian=True))
    lower, _ = damped_root(gram, level)
    return average + torch.cholesky_solve(missing.mT, lower).mT


def damped_root(gram: Tensor, level: float) -> tuple[Tensor, float]:
    """Return lower R with R R^T = G + level 1, and the level: tenfold until there is an R.

    Sums of products in float32 can leave G a little below semidefinite.
    """
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(40):
        lower, failed = torch.linalg.cholesky_ex(gram + level * eye)
        if not failed:
            break
        level *= 10
    return lower, level


def _unbiased(fused: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a down bias of zero, where there is one."""
    name = "down_proj_bias"
    return {**fused, name: torch.zeros_like(fused[name])} if name in fused else fused
