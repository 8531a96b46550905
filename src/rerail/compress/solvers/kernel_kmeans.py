"""K-means of vectors of which only the inner products G (E, E) are known.

With c the mean of a cluster's members, all that Lloyd's iterations need is in G:

    d^2(e, c) = G_ee - 2/|c| sum_{j in c} G_ej + 1/|c|^2 sum_{j,j' in c} G_jj'
    J = sum_e d^2(e, c_e)

so the vectors themselves (an expert's outputs on thousands of tokens) are never kept.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.compress.solvers.reconstruction import every_output
from rerail.moe.model import MoELayer

_NUMBERS = 1 << 23  # of outputs in memory at once
_STEPS = 100  # Lloyd's iterations; they end much earlier


def output_gram(layer: MoELayer, hidden: Tensor, unit: bool) -> Tensor:
    """Return (1/n) sum_t <Y_i[t], Y_j[t]> of all experts' outputs, float64 (E, E).

    Args:
        layer: whose experts answer, ungated.
        hidden: (n, H) inputs.
        unit: bring every output to length 1 first, which makes cosines; a zero output counts 0.
    """
    gram = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)
    step = max(1, _NUMBERS // (layer.num_experts * layer.hidden_size))
    for rows in torch.split(hidden.to(layer.router_rows), step):
        outputs = every_output(layer, rows).double()
        if unit:
            outputs = F.normalize(outputs, dim=2, eps=1e-300)
        flat = outputs.transpose(0, 1).flatten(1)
        gram += (flat @ flat.mT).cpu()
    return gram / max(1, len(hidden))


def seed_orders(gram: Tensor, restarts: int, generator: torch.Generator) -> Tensor:
    """Return int64 (R, E), orders in which k-means++ draws all points as seeds.

    The first k of an order are its seeds for k clusters: each is drawn with a probability
    proportional to d^2 to the nearest one before it, twins of earlier ones last.
    """
    size, diagonal = len(gram), gram.diagonal()
    near = torch.full((restarts, size), torch.inf, dtype=gram.dtype)
    free, order = torch.ones(restarts, size, dtype=torch.bool), []
    weights = torch.ones(restarts, size, dtype=gram.dtype)
    for _ in range(size):
        drawn = torch.multinomial(weights, 1, generator=generator)
        order.append(drawn)
        free.scatter_(1, drawn, False)
        to = diagonal + diagonal[drawn] - 2 * gram[drawn.squeeze(1)]
        near = torch.minimum(near, to.clamp(min=0))
        weights = near * free
        spent = weights.sum(dim=1, keepdim=True) <= 0
        weights = torch.where(spent, free.to(gram.dtype), weights)
        weights = weights.masked_fill(~free.any(dim=1, keepdim=True), 1.0)
    return torch.cat(order, dim=1)


def lloyd(gram: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels (R, E) and J (R,) where assignments no longer change.

    An empty cluster takes the point that is farthest from the mean of its own.

    Args:
        gram: G (E, E).
        seeds: (R, k), points that the clusters start from; all restarts run side by side.
    """
    count, diagonal = seeds.shape[1], gram.diagonal()
    distance = diagonal.view(1, -1, 1) - 2 * gram[:, seeds].transpose(0, 1)
    distance = distance + diagonal[seeds].unsqueeze(1)
    labels = _filled(distance, distance.argmin(dim=2))
    for _ in range(_STEPS):
        distance = _distances(gram, labels, count)
        moved = _filled(distance, distance.argmin(dim=2))
        if torch.equal(moved, labels):
            break
        labels = moved
    loss = _distances(gram, labels, count).gather(2, labels.unsqueeze(2)).sum(dim=(1, 2))
    return labels, loss.masked_fill(loss < 1e-9 * diagonal.sum(), 0.0)


def clustered(gram: Tensor, orders: Tensor, count: int) -> tuple[Tensor, float]:
    """Return labels (E,), numbered by their lowest member, and J / tr G, of the best restart.

    Args:
        gram: G (E, E).
        orders: of `seed_orders`.
        count: k.
    """
    labels, loss = lloyd(gram, orders[:, :count])
    best = labels[int(loss.argmin())].tolist()
    number = {label: i for i, label in enumerate(dict.fromkeys(best))}
    share = loss.min() / gram.trace().clamp(min=1e-300)
    return torch.tensor([number[label] for label in best]), float(share)


def _distances(gram: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return d^2 to the mean of each cluster, (R, E, k)."""
    member = F.one_hot(labels, count).to(gram.dtype)
    size = member.sum(dim=1, keepdim=True)
    cross = gram @ member / size
    inner = (member * cross).sum(dim=1, keepdim=True) / size
    return gram.diagonal().view(1, -1, 1) - 2 * cross + inner


def _filled(distance: Tensor, labels: Tensor) -> Tensor:
    """Return labels with a member in every cluster."""
    for row, own in enumerate(labels):
        sizes = torch.bincount(own, minlength=distance.shape[2])
        for empty in torch.nonzero(sizes == 0).flatten().tolist():
            far = distance[row].gather(1, own.unsqueeze(1)).squeeze(1)
            point = int(far.masked_fill(sizes[own] < 2, -torch.inf).argmax())
            sizes[own[point]] -= 1
            own[point], sizes[empty] = empty, 1
    return labels
