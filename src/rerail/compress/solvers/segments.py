"""Segments: an expert as a sum of channels, which can move from one expert to another.

E(x) = sum_j act(g_j x) (u_j x) d_j. Where the family's own product is linear in u_j x, the channel
(g, -u, -d) is the same function as (g, u, d); biases of gate and up are entries of g and u.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rerail.compress.solvers.grouping import Fused, wide
from rerail.moe.fused_experts import ExpertWeights, expert_parameters
from rerail.moe.model import MoELayer

Start = Literal["own", "magnitude"]
Features = Literal["up_down", "all"]

_CHUNK = 4096  # segments that are compared at once
_BIAS = "gate_up_proj_bias"


class Absorption(NamedTuple):
    """How an expert makes room for what it receives.

    Attributes:
        init: what clusters start from: an expert's `own` segments, or of all that it has those of
            the largest max g + |min g| (`magnitude`).
        signs: whether u and d may change their sign together.
        scaled: multiply d by how many of the expert's own segments a mean stands for.
    """

    init: Start
    signs: bool
    scaled: bool


class Segments(NamedTuple):
    """Channels (..., n), in float32 or wider.

    Attributes:
        gate: g (n, H), or (n, H + 1) with biases.
        rest: u and d side by side (n, 2H), or (n, 2H + 1): what may change its sign as a whole.
    """

    gate: Tensor
    rest: Tensor

    def at(self, index: Tensor | list[int]) -> "Segments":
        return Segments(self.gate[index], self.rest[index])

    def flat(self) -> "Segments":
        return Segments(self.gate.flatten(0, 1), self.rest.flatten(0, 1))

    def norms(self) -> Tensor:
        """Return the norms of [g | u | d], (n,)."""
        return (self.gate.square().sum(dim=-1) + self.rest.square().sum(dim=-1)).sqrt()

    def unit(self) -> "Segments":
        """Return directions; a segment of nothing has none."""
        scale = self.norms().clamp(min=1e-30).unsqueeze(-1)
        return Segments(self.gate / scale, self.rest / scale)


def segments_of(layer: MoELayer) -> Segments:
    """Return the segments of all experts of a layer, (E, I)."""
    stock = {n: p.detach() for n, p in expert_parameters(layer.stock()).items()}
    gate, up, down = layer.layout.unpack(stock["gate_up_proj"], stock["down_proj"])
    gates, rest = [gate], [up, down.mT]
    if _BIAS in stock:
        halves = stock[_BIAS].chunk(2, dim=1)
        if not layer.layout.concatenated:
            halves = stock[_BIAS][:, ::2], stock[_BIAS][:, 1::2]
        gates, rest = [gate, halves[0].unsqueeze(2)], [up, down.mT, halves[1].unsqueeze(2)]
    return Segments(*(torch.cat(parts, dim=2).to(wide(gate.dtype)) for parts in (gates, rest)))


def fused_segments(layer: MoELayer, segments: Segments, experts: list[int]) -> Fused:
    """Return fused tensors (M, ...) of segments (M, I); other biases are those of `experts`."""
    size = layer.hidden_size
    gate, up = segments.gate[..., :size], segments.rest[..., :size]
    down = segments.rest[..., size : 2 * size]
    fused = layer.layout.pack(ExpertWeights(gate, up, down.mT))
    if segments.gate.shape[2] > size:
        pair = segments.gate[..., size], segments.rest[..., 2 * size]
        joined = (
            torch.cat(pair, 1) if layer.layout.concatenated else torch.stack(pair, 2).flatten(1)
        )
        fused[_BIAS] = joined
    stock = expert_parameters(layer.stock())
    left = {n: p.detach()[experts] for n, p in stock.items() if n not in fused}
    return {**fused, **left}


def signs_are_free(layer: MoELayer) -> bool:
    """Return whether (g, -u, -d) is the function of (g, u, d), tried on an expert of the layer."""
    own = segments_of(layer).at([0])
    inputs = torch.randn(16, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(layer.router_rows)
    first, ones = torch.zeros(16, 1, dtype=torch.int64), torch.ones(16, 1)
    index, weights = first.to(inputs.device), ones.to(inputs)
    plain, flipped = (
        layer.run(inputs, index, weights, **{n: t.to(inputs) for n, t in fused.items()}).float()
        for fused in (
            fused_segments(layer, segments, [0]) for segments in (own, own._replace(rest=-own.rest))
        )
    )
    return bool((plain - flipped).norm() <= 0.01 * plain.norm())


def nearest(
    segments: Segments, among: Segments, features: Features, signs: bool
) -> tuple[Tensor, Tensor]:
    """Return the most similar of other segments (n,), and its cosine (n,).

    Args:
        segments: (n,).
        among: (m,).
        features: compared are [u | d], or [g | u | d].
        signs: u and d may change their sign together.
    """
    if features == "up_down":
        segments, among = (s._replace(gate=s.gate[:, :0]) for s in (segments, among))
    segments, among = segments.unit(), among.unit()
    best = [
        _cosines(Segments(*part), among, signs)[0].max(dim=1)
        for part in zip(*(torch.split(part, _CHUNK) for part in segments), strict=True)
    ]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


def _cosines(a: Segments, b: Segments, signs: bool) -> tuple[Tensor, Tensor]:
    """Return cosines of directions (n, m), and the signs with which they are taken."""
    rest = a.rest @ b.rest.mT
    sign = torch.where(rest < 0, -1.0, 1.0).to(rest) if signs else torch.ones_like(rest)
    return a.gate @ b.gate.mT + sign * rest, sign


def spherical_k_means(
    segments: Segments, weights: Tensor, seeds: Tensor, signs: bool, steps: int = 20
) -> tuple[Segments, Tensor]:
    """Return as many segments as there are seeds, and the cluster of each one that came, (n,).

    Clusters are of directions; a mean has the direction of its members' weighted mean and the mean
    of their norms. A cluster of one is that segment, to the bit. An empty cluster takes the segment
    that is farthest from its own mean.

    Args:
        segments: (n,).
        weights: (n,), positive.
        seeds: which of them clusters start from, (I,).
        signs: as in `nearest`.
        steps: at most.
    """
    unit, norms = segments.unit(), segments.norms()
    means, labels = unit.at(seeds), torch.full_like(seeds, -1)
    for _ in range(steps):
        cosines, signed = _cosines(unit, means, signs)
        near, found = cosines.max(dim=1)
        found, sizes = _refilled(found, near, len(seeds))
        sign = signed.gather(1, found.unsqueeze(1))
        if torch.equal(found, labels):
            break
        labels, share = found, weights.to(unit.gate).unsqueeze(1)
        means = Segments(
            torch.zeros_like(means.gate).index_add(0, labels, share * unit.gate),
            torch.zeros_like(means.rest).index_add(0, labels, share * sign * unit.rest),
        ).unit()
    length = torch.zeros_like(norms[: len(seeds)]).index_add(0, labels, norms) / sizes
    out = Segments(*(part * length.unsqueeze(1) for part in means))
    alone = torch.nonzero(sizes[labels] == 1).flatten()
    for whole, part in zip(out, segments.at(alone), strict=True):
        whole[labels[alone]] = part
    return out, labels


def redistributed(
    stay: Segments,
    go: Segments,
    to: Tensor,
    weights: tuple[Tensor, Tensor],
    how: Absorption,
) -> tuple[Segments, Tensor]:
    """Return the segments (M, I) of experts that took others in, and what part of which they took.

    An expert that takes nothing stays as it is.

    Args:
        stay: the experts' own segments (M, I).
        go: those of D others, (D, I).
        to: which expert takes each of these, (D * I,); -1 for none.
        weights: of the experts (M,) and of the others (D,).
        how: they are taken in.

    Returns:
        the segments, and float64 (M, D): shares of the others' segments.
    """
    width, hidden = stay.gate.shape[1], stay.rest.shape[2] // 2
    source, made = torch.arange(len(to), device=to.device) // width, []
    shares = torch.zeros(len(stay.gate), len(go.gate), dtype=torch.float64)
    own_weight, other_weight = (w.double().clamp(min=1e-9).to(to.device) for w in weights)
    for r, own in enumerate(Segments(*parts) for parts in zip(*stay, strict=True)):
        came = torch.nonzero(to == r).flatten()
        if not len(came):
            made.append(own)
            continue
        shares[r] = torch.bincount(source[came], minlength=len(go.gate)).cpu() / width
        both = Segments(*map(torch.cat, zip(own, go.flat().at(came), strict=True)))
        seeds = torch.arange(width, device=to.device)
        if how.init == "magnitude":
            size = both.gate.amax(dim=1) + both.gate.amin(dim=1).abs()
            seeds = torch.argsort(size, descending=True, stable=True)[:width]
        share = torch.cat([own_weight[r].expand(width), other_weight[source[came]]])
        means, labels = spherical_k_means(both, share, seeds, how.signs)
        if how.scaled:
            count = torch.bincount(labels[:width], minlength=width).clamp(min=1)
            means.rest[:, hidden : 2 * hidden] *= count.unsqueeze(1)
        made.append(means)
    return Segments(*map(torch.stack, zip(*made, strict=True))), shares


def _refilled(labels: Tensor, near: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return labels with a member in every cluster, and the clusters' sizes."""
    labels, sizes = labels.clone(), torch.bincount(labels, minlength=count)
    for empty in torch.nonzero(sizes == 0).flatten().tolist():
        far = int(near.masked_fill(sizes[labels] < 2, torch.inf).argmin())
        sizes[labels[far]] -= 1
        labels[far], sizes[empty] = empty, 1
    return labels, sizes
