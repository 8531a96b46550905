"""Groups of experts: how alike experts are, who belongs to whom, and the sums of a group."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rerail.experts.base import BankSpec, Member
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer

Fused = dict[str, Tensor]
Change = Callable[[int, Fused], Fused]


def labels_around(similarity: Tensor, dominants: Sequence[int]) -> Tensor:
    """Return labels (E,) that give each expert to the dominant one that it is most alike.

    Args:
        similarity: (E, E), higher means more alike.
        dominants: slots, which keep the labels 0, 1 ... in this order.
    """
    labels = similarity[:, list(dominants)].argmax(dim=1)
    labels[list(dominants)] = torch.arange(len(dominants))
    return labels


def absorbed(similarity: Tensor, centroids: Sequence[int], size: int) -> Tensor:
    """Return labels (E,): in turn, each centroid takes those most like it that are still free.

    Args:
        similarity: (E, E), higher means more alike; ties go to the lower slot.
        centroids: slots in the order of their turns, which take the labels 0, 1 ...
        size: most members of a group, its centroid among them; enough to take all experts.
    """
    labels = torch.full((len(similarity),), -1)
    labels[list(centroids)] = torch.arange(len(centroids))
    for label, centroid in enumerate(centroids):
        order = torch.argsort(similarity[centroid], descending=True, stable=True)
        labels[order[labels[order] < 0][: size - 1]] = label
    return labels


def cosine(gram: Tensor) -> Tensor:
    """Return the cosines G_ij / sqrt(G_ii G_jj) of a Gram matrix (E, E); 0 for a zero vector."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, norms.reciprocal(), 0.0)
    return gram * scale.unsqueeze(1) * scale


def weight_gram(*stacks: Tensor) -> Tensor:
    """Return the float64 Gram matrix (E, E) of experts flattened over all stacks (E, ...)."""
    flat = [stack.detach().flatten(1).to(wide(stack.dtype)) for stack in stacks]
    return torch.stack([part @ part.mT for part in flat]).sum(dim=0).cpu().double()


def shares_in_group(labels: Tensor, weights: Tensor) -> Tensor:
    """Return float64 weights (E,) that sum to 1 in each group; one without weight is averaged."""
    weights = weights.double()
    empty = torch.zeros(int(labels.max()) + 1, dtype=torch.float64)
    total = empty.index_add(0, labels, weights)
    counts = empty.index_add(0, labels, torch.ones_like(weights))
    alone = total == 0
    return torch.where(
        alone[labels], 1 / counts[labels], weights / total.masked_fill(alone, 1)[labels]
    )


def group_members(layer: int, labels: Tensor, weights: Tensor) -> tuple[tuple[Member, ...], ...]:
    """Return the members of each label with their shares."""
    groups: list[list[Member]] = [[] for _ in range(int(labels.max()) + 1)]
    share = shares_in_group(labels, weights).tolist()
    for expert, label in enumerate(labels.tolist()):
        groups[label].append((layer, expert, share[expert]))
    return tuple(tuple(group) for group in groups)


def merged_experts(
    layer: MoELayer, labels: Tensor, weights: Tensor, change: Change = lambda _, expert: expert
) -> Fused:
    """Return sum_{e in c} b_e W_e of every group as fused tensors (M, ...), in float32 or wider.

    A group of one is that expert, to the bit.

    Args:
        layer: holds the experts.
        labels: (E,).
        weights: (E,), normalised here.
        change: gives slot e's tensors another form before they are added (aligned, say).
    """
    stock = {n: p.detach() for n, p in expert_parameters(layer.stock()).items()}
    count = int(labels.max()) + 1
    out = {
        n: torch.zeros(count, *p.shape[1:], dtype=wide(p.dtype), device=p.device)
        for n, p in stock.items()
    }
    share, sizes = shares_in_group(labels, weights).tolist(), torch.bincount(labels).tolist()
    for e, label in enumerate(labels.tolist()):
        own = {n: p[e] for n, p in stock.items()}
        for name, tensor in (own if sizes[label] == 1 else change(e, own)).items():
            out[name][label] += share[e] * tensor.to(out[name].dtype)
    return out


def whole_experts(layer: MoELayer, fused: Fused) -> tuple[BankSpec, Fused]:
    """Return the form of solved experts (M, ...), and their tensors in the layer's own dtype."""
    like = expert_parameters(layer.stock())
    solved = {name: tensor.to(like[name].dtype).cpu() for name, tensor in fused.items()}
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in solved.items()}
    return BankSpec("merged", len(fused["down_proj"]), (), shapes), solved


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
