"""Tucker decompositions of a stack of matrices, in float64.

A stack T (E, O, D) is G x1 U1 x2 U2 x3 U3 with a core G (r1, r2, r3) and U1 (E, r1), U2 (O, r2),
U3 (D, r3) orthonormal. HOSVD takes for U_m the top eigenvectors of the Gram matrix of the mode-m
unfolding; with what each mode discards, the sum of its smaller eigenvalues,

    max_m discarded_m  <=  ||T - T'||^2  <=  sum_m discarded_m.

HOOI then renews one U_m after the other for the tensor that the others are projected on, which
never makes the error larger. At r1 = E, U1 is a rotation of the core and is left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rerail.compress.solvers.whitening import Moments
from rerail.moe.model import MoELayer
from rerail.statistics.moments import LayerMoment, OutputGradientMoment, PooledMiddleMoment
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, Statistic
from rerail.transfer import moved

Triple = tuple[int, ...]


class Roots(NamedTuple):
    """S and S^-1 (D, D)."""

    root: Tensor
    inverse: Tensor


class Rule(NamedTuple):
    """How ranks are chosen: in how many numbers, also below r1 = E, by spectra or by numbers."""

    max_numbers: int
    search: bool
    by_energy: bool


Sides = tuple[Roots | None, Roots | None]


def roots(moment: Tensor, power: float) -> Roots:
    """Return S = C^power of a moment, scaled to a mean diagonal of one, and S^-1.

    So the scale of what was measured moves nothing. Directions without energy become 0 in both.
    """
    values, vectors = torch.linalg.eigh(moment / moment.diagonal().mean())
    seen = values > 1e-14 * values.max()
    pair = (torch.where(seen, values**p, 0.0) for p in (power, -power))
    return Roots(*(vectors * factors @ vectors.mT for factors in pair))


def side_statistics(inputs: bool, outputs: bool) -> tuple[Statistic, ...]:
    """Return what `layer_sides` reads."""
    seen = (Count(), LayerMoment(), PooledMiddleMoment()) if inputs else ()
    made = [OutputGradientMoment(name) for name in ("gate", "up", "down")] if outputs else []
    return (*seen, *made)


def layer_sides(
    layer: MoELayer,
    statistics: LayerStatistics,
    inputs: bool,
    outputs: bool,
    ridge: float,
    power: float,
) -> dict[str, Sides]:
    """Return S_O and S_D by matrix type, of moments pooled over experts; None where not asked for.

    Args:
        layer: of the original model.
        statistics: of the layer.
        inputs, outputs: which sides are whitened.
        ridge: see `whitening.Moments`.
        power: of a moment that makes S.

    Raises:
        InputError: the text was too short for the solves.
    """

    def root(statistic: Statistic, count: int, where: str = "") -> Roots:
        sums = moved(statistics[statistic], layer.router_rows.device)
        moments = Moments(sums.unsqueeze(0), torch.tensor([count]), len(sums), ridge=ridge)
        if where:
            moments.check(f"layer {layer.index}, {where}", count)
        return roots(moments.layer(sums.device), power)

    wide: Roots | None = None
    middle: Roots | None = None
    if inputs:
        pairs = int(statistics[Count()].sum())
        wide = root(LayerMoment(), pairs // layer.top_k, "gate and up")
        middle = root(PooledMiddleMoment(), pairs, "down")
    made = {m: root(OutputGradientMoment(m), 1) if outputs else None for m in layer.dims.matrices}
    return {m: (made[m], middle if m == "down" else wide) for m in made}


def spectrum(stack: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, falling, and eigenvectors of the Gram matrix of an unfolding."""
    unfolded = stack.movedim(mode, 0).flatten(1)
    values, vectors = torch.linalg.eigh(unfolded @ unfolded.mT)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def projected(stack: Tensor, factors: Sequence[Tensor | None], but: int = -1) -> Tensor:
    """Return the stack times U_m^T along every mode m, but one; None stands for the identity."""
    for mode, factor in enumerate(factors):
        if factor is not None and mode != but:
            stack = torch.tensordot(stack, factor, dims=([mode], [0])).movedim(-1, mode)
    return stack


def decomposed(
    stack: Tensor, sides: Sides, rule: Rule, iterations: int = 0
) -> tuple[Triple, dict[str, Tensor]]:
    """Return r1, r2, r3 and `core`, `out` U2, `in` U3 and, below full rank, `expert` U1.

    Args:
        stack: W (E, O, D).
        sides: S_O and S_D, which are taken off U2 and U3 again; None for the identity.
        rule: how ranks are chosen.
        iterations: of HOOI; 0 is HOSVD.
    """
    outer, inner = sides
    stack = stack.double() if outer is None else outer.root @ stack.double()
    stack = stack if inner is None else stack @ inner.root
    spectra = [spectrum(stack, mode) for mode in range(3)]
    values = [of_mode for of_mode, _ in spectra] if rule.by_energy else []
    ranks = best_triple(stack.shape, rule.max_numbers, rule.search, values)
    parts: list[Tensor | None] = [v[:, :r] for (_, v), r in zip(spectra, ranks, strict=True)]
    parts[0] = None if ranks[0] == len(stack) else parts[0]
    for mode in [*range(3)] * iterations:
        if parts[mode] is not None:
            others = projected(stack, parts, but=mode)
            parts[mode] = spectrum(others, mode)[1][:, : ranks[mode]]
    core = projected(stack, parts)
    plain = zip(parts, (None, *sides), strict=True)
    parts = [u if u is None or side is None else side.inverse @ u for u, side in plain]
    named = {"core": core, "expert": parts[0], "out": parts[1], "in": parts[2]}
    return ranks, {name: part for name, part in named.items() if part is not None}


def best_triple(
    shape: Sequence[int], max_numbers: int, search: bool, spectra: Sequence[Tensor] = ()
) -> Triple:
    """Return the ranks (r1, r2, r3) with the least discarded energy in a number of numbers.

    For r1 = E (or all r1) and all r2, r3 is the largest that fits. Of these triples the one with
    the least sum_m sum_{i > r_m} lambda_mi is taken, the bound on the error; without spectra the
    one that leaves the fewest numbers over.

    Args:
        shape: (E, O, D).
        max_numbers: of core and factors, U1 left out at r1 = E; enough for (E, 1, 1).
        search: try all r1.
        spectra: lambda_m, falling.
    """
    n, out, inner = shape
    r1, r2 = torch.arange(1 if search else n, n + 1)[:, None], torch.arange(1, out + 1)[None]
    left = max_numbers - torch.where(r1 < n, n * r1, 0) - out * r2
    r3 = (left // (r1 * r2 + inner)).clamp(0, inner)
    ranks = torch.stack([r1.expand_as(r3), r2.expand_as(r3), r3], dim=-1).flatten(0, 1)
    over = (left - r3 * (r1 * r2 + inner)).flatten().double()
    if spectra:
        over = torch.zeros_like(over)
        for values, rank in zip(spectra, ranks.unbind(-1), strict=True):
            tails = values.cpu().flip(0).cumsum(0).flip(0)
            over += torch.cat([tails, tails.new_zeros(1)])[rank]
    return tuple(ranks[over.where(r3.flatten() >= 1, torch.inf).argmin()].tolist())
