"""Which channel of one expert does the work of which of another, by what they do and what they are.

Where `alignment.weight_matching` maximises inner products of weights, here distances are added: of
the activations on the same tokens, and of the weights seen in their principal components.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from rerail.compress.solvers.alignment import channel_features
from rerail.compress.solvers.grouping import wide
from rerail.compress.solvers.least_squares import channel_activations
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer

_SPARE, _POWERS = 8, 6  # of the subspace iteration: axes beyond those asked for, and steps


class ChannelMatching:
    """Costs C(r, s) = C_act + C_wt of channel r of one expert and channel s of another.

    C_act is the distance of their activations a (n,), brought to length 1, on the inputs; C_wt that
    of their rows [W_G | W_U | W_D^T], brought to length 1, centred over the layer, projected to
    `axes` principal components and brought to length 1 again.

    Attributes:
        layer: holds the experts.
        inputs: (n, H), the same for every expert; only weights need none.
        by: which costs are added.
        axes: of the principal components.
        seed: of their solver.
    """

    def __init__(
        self,
        layer: MoELayer,
        inputs: Tensor | None,
        by: Literal["both", "activations", "weights"] = "both",
        axes: int = 64,
        seed: int = 0,
    ):
        self.layer, self.by = layer, by
        self.stock = {n: p.detach() for n, p in expert_parameters(layer.stock()).items()}
        self.inputs = None if inputs is None else inputs.to(layer.router_rows)
        if by != "activations":
            slots = range(layer.num_experts)
            self.mean, self.axes = principal_axes(lambda: map(self._rows, slots), axes, seed)

    def order(self, to: int, slot: int) -> Tensor:
        """Return the order (I,) in which the channels of `slot` are nearest to those of `to`."""
        parts = []
        if self.by != "weights":
            parts.append((self._activations(to), self._activations(slot)))
        if self.by != "activations":
            parts.append((self._scores(to), self._scores(slot)))
        cost = torch.stack([unit_distances(*pair) for pair in parts]).sum(dim=0)
        return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])

    def _activations(self, slot: int) -> Tensor:
        assert self.inputs is not None
        expert = {name: tensor[slot : slot + 1] for name, tensor in self.stock.items()}
        activations = channel_activations(self.layer, expert, self.inputs)
        return activations.to(wide(activations.dtype)).mT

    def _rows(self, slot: int) -> Tensor:
        expert = {name: tensor[slot] for name, tensor in self.stock.items()}
        return F.normalize(channel_features(expert, self.layer.layout), dim=1)

    def _scores(self, slot: int) -> Tensor:
        return (self._rows(slot) - self.mean) @ self.axes


def unit_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return Euclidean distances of rows brought to length 1: (I, D), (J, D) -> (I, J)."""
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    squares = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1) - 2 * a @ b.mT
    return squares.clamp(min=0).sqrt()


def principal_axes(
    rows: Callable[[], Iterable[Tensor]], count: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) of all rows and the axes (D, count) of most variance, largest first.

    By subspace iteration, so that the covariance (D, D) is never made; exact where rows span no
    more dimensions than it follows.

    Args:
        rows: gives them, in parts (n, D), anew at every step.
        count: cut down to D.
        seed: of the start.
    """
    total, number = torch.zeros(()), 0
    for part in rows():
        total, number = total + part.sum(dim=0), number + len(part)
    mean = total / number
    size = len(mean)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, min(size, count + _SPARE), generator=generator)
    axes = torch.linalg.qr(start.to(mean)).Q

    def spread(axes: Tensor) -> Tensor:
        centred = (part - mean for part in rows())
        return torch.stack([part.mT @ (part @ axes) for part in centred]).sum(dim=0)

    for _ in range(_POWERS):
        axes = torch.linalg.qr(spread(axes)).Q
    within = torch.linalg.eigh(axes.mT @ spread(axes)).eigenvectors
    return mean, axes @ within.flip(1)[:, :count]
