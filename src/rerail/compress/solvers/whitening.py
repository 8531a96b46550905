"""Low-rank solves that weigh errors by what really goes into a matrix; none inverts a moment.

Symbols: W (out, in) a matrix, C (in, in) the mean of x x^T over the tokens that it answers, W' an
approximation. The loss is tr (W - W') C (W - W')^T, the mean squared error of the outputs. Its
least value at rank r is the sum of the dropped eigenvalues of W C W^T, reached by W' = U U^T W with
U (out, r) the top eigenvectors. A tall W is first written W = Q R with Q^T Q = 1, so that the
eigenproblem is always the small one. Solves are float64, but where a float32 one is as good: see
`leading`.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rerail.errors import InputError
from rerail.moe.model import MoELayer
from rerail.statistics.moments import InputMoment, MiddleMoment
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, Statistic
from rerail.transfer import moved

log = logging.getLogger(__name__)

# what a truncation must drop, as a share of all energy, to outweigh float32's rounding of it
LEAST_DROPPED = 1e-3


@dataclass(frozen=True)
class Moments:
    """Mean second moments of what each expert sees, made safe for experts that saw little.

    With c_e tokens at expert e, C_e = (1 - w) S_e / c_e + w sum_j S_j / sum_j c_j with w = m / (m +
    c_e) and m = `shrink` * D: rare experts lean on the layer's own moment, and one that was never
    routed to has it alone. Then `ridge` times the mean of the diagonal is added to the diagonal.
    Both are relative, so neither the scale of x nor the number of tokens moves a solution.

    Attributes:
        sums: S, the sums of x x^T (E, D, D); None stands for C = 1 (plain SVD).
        count: c (E,).
        size: D.
        shrink: m as a multiple of D.
        ridge: relative.
    """

    sums: Tensor | None
    count: Tensor
    size: int
    shrink: float = 0.0
    ridge: float = 0.0

    @functools.cached_property
    def _pools(self) -> dict[torch.device, Tensor]:
        return {}

    def _pooled(self, device: torch.device) -> Tensor:
        """Return the mean over all experts, made once and brought to a device once."""
        if device not in self._pools:
            assert self.sums is not None
            pooled = self.sums.sum(dim=0, dtype=torch.float64) / self.count.sum().clamp(min=1)
            self._pools[device] = moved(pooled, device)
        return self._pools[device]

    def of(self, expert: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return C_e (D, D), float64 by default."""
        if self.sums is None:
            return torch.eye(self.size, dtype=dtype, device=device)
        count, few = float(self.count[expert]), self.shrink * self.size
        w = few / (few + count) if count else 1.0
        own = moved(self.sums[expert], device).to(dtype, copy=True)
        own /= max(count, 1.0)
        own *= 1 - w
        own += w * self._pooled(device).to(dtype)
        return self._ridged(own)

    def layer(self, device: torch.device) -> Tensor:
        """Return the layer's own C, float64 (D, D)."""
        if self.sums is None:
            return torch.eye(self.size, dtype=torch.float64, device=device)
        return self._ridged(self._pooled(device).clone())

    def sliced(self, kept: Sequence[int]) -> "Moments":
        """Return the moments of some channels."""
        sums = self.sums if self.sums is None else self.sums[:, kept][:, :, kept]
        return replace(self, sums=sums, size=len(kept))

    def _ridged(self, moment: Tensor) -> Tensor:
        """Add the ridge to a moment, in place."""
        diagonal = moment.diagonal()
        scale = diagonal.mean()
        if scale <= 0:
            return torch.eye(self.size).to(moment)
        diagonal += self.ridge * scale
        return moment

    def check(self, where: str, distinct: int) -> None:
        """Check that enough tokens were seen, and say which experts fall back on the layer.

        Args:
            where: names the moment in a message.
            distinct: how many different vectors the whole layer saw.

        Raises:
            InputError: too few, and how many are needed.
        """
        if self.sums is None:
            return
        remedy = "take more calibration text"
        if distinct < self.size:
            raise InputError(
                f"{where}: a whitened solve needs at least {self.size} calibration tokens, and "
                f"there were {distinct}; {remedy} or set compressor.whiten=false"
            )
        rare = [e for e, c in enumerate(self.count.tolist()) if 0 < c < self.size]
        if rare and not self.shrink:
            fewest = int(self.count[rare].min())
            raise InputError(
                f"{where}: without shrinkage a whitened solve needs at least {self.size} tokens at "
                f"each expert, and experts {rare} had down to {fewest}; {remedy} or set "
                "compressor.shrink=0.25"
            )
        if never := [e for e, c in enumerate(self.count.tolist()) if c == 0]:
            log.info(
                "%s: experts %s were never routed to; the layer's moment is used", where, never
            )


def moment_statistics(whiten: bool) -> tuple[Statistic, ...]:
    """Return what `layer_moments` reads."""
    return (Count(), InputMoment(), MiddleMoment()) if whiten else ()


def layer_moments(
    layer: MoELayer, statistics: LayerStatistics, whiten: bool, shrink: float, ridge: float
) -> dict[str, Moments]:
    """Return the moments of a layer by matrix type; gate and up share theirs.

    Args:
        layer: of the original model.
        statistics: of the layer.
        whiten: weigh errors by the text; false gives C = 1.
        shrink, ridge: see `Moments`.

    Raises:
        InputError: the text was too short for the solves.
    """
    n, p, d, _ = layer.dims
    sums: list[Tensor | None] = [None, None]
    count = torch.zeros(n)
    if whiten:
        count = statistics[Count()]
        sums = [statistics[InputMoment()], statistics[MiddleMoment()]]
    inputs, middle = (
        Moments(s, count, size, shrink, ridge) for s, size in zip(sums, (d, p), strict=True)
    )
    pairs = int(count.sum())
    inputs.check(f"layer {layer.index}, gate and up", pairs // layer.top_k)
    middle.check(f"layer {layer.index}, down", pairs)
    return {"gate": inputs, "up": inputs, "down": middle}


def principal(
    weight: Tensor, moment: Tensor, rank: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the whitened spectrum of W and its factors.

    Args:
        weight: W (out, in).
        moment: C (in, in) in the same dtype.
        rank: r; by default m = min(out, in).

    Returns:
        eigenvalues of W C W^T, falling (m,); U (out, r) orthonormal; V = U^T W (r, in). The columns
        and rows up to any smaller rank are the best factors of that rank.
    """
    q, small = None, weight
    if weight.shape[0] > weight.shape[1]:
        q, small = torch.linalg.qr(weight)
    values, x = torch.linalg.eigh(small @ moment @ small.mT)
    values, x = values.flip(0).clamp(min=0), x.flip(1)[:, :rank]
    return values, x if q is None else q @ x, x.mT @ small


def leading(weight: Tensor, moments: Moments, expert: int, rank: int) -> tuple[Tensor, ...]:
    """Return `principal` of an expert's W, cut to a rank.

    What float32 does to a subspace costs in second order only: where the dropped eigenvalues are
    `LEAST_DROPPED` of all, the weights' error is that of a float64 solve to within 1e-6 of the
    weights, at less than half the time. Where fewer are dropped, the solve is float64.

    Args:
        weight: W (out, in).
        moments: of what it is applied to.
        expert: its number there.
        rank: r.

    Returns:
        eigenvalues (r,), U (out, r) and V (r, in).
    """
    narrow = torch.promote_types(weight.dtype, torch.float32)
    for dtype in dict.fromkeys((narrow, torch.float64)):
        moment = moments.of(expert, weight.device, dtype)
        values, u, v = principal(weight.to(dtype), moment, rank)
        if values[rank:].sum() >= LEAST_DROPPED * values.sum():
            break
    return values[:rank], u, v


def low_rank(stack: Tensor, moments: Moments, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the best factors of each expert, side by side along the rank axis.

    Args:
        stack: (E, out, in).
        moments: of what the matrices are applied to.
        ranks: r_e of each expert; their sum is R.

    Returns:
        U (out, R) and V (R, in), in float32 or wider.
    """
    columns, rows = [], []
    for e, rank in enumerate(ranks):
        _, u, v = leading(stack[e], moments, e, rank)
        columns.append(u)
        rows.append(v)
    wide = torch.promote_types(stack.dtype, torch.float32)
    return torch.cat(columns, dim=1).to(wide), torch.cat(rows).to(wide)


def effective_ranks(stack: Tensor, moments: Moments) -> Tensor:
    """Return exp(entropy) of each expert's whitened spectrum, float64 (E,), at least 1."""
    ranks = []
    for e, weight in enumerate(stack):
        values = principal(weight.double(), moments.of(e, stack.device))[0]
        share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        ranks.append(torch.special.entr(share).sum().exp())
    return torch.stack(ranks).cpu()


def normed(values: Tensor, rows: Tensor) -> Tensor:
    """Return rows scaled so that V C V^T = 1; rows without energy become zero."""
    scale = torch.where(values > 1e-14 * values.max(), values.rsqrt(), 0.0)
    return scale.unsqueeze(1) * rows


def stack_rows(stack: Tensor, share: Tensor, moment: Tensor, rank: int) -> Tensor:
    """Return the rows V (r, in) that serve all experts best: sum_e share_e loss_e is least.

    They are the right factor of the weighted stack of all W_e; V C V^T = 1.
    """
    weighted = stack.double() * share.to(stack.device).sqrt().view(-1, 1, 1)
    small = torch.linalg.qr(weighted.flatten(0, 1), mode="r").R
    values, _, rows = principal(small, moment)
    return normed(values, rows)[:rank]


def refitted(stack: Tensor, rows: Tensor, moments: Moments) -> Tensor:
    """Return U (E, out, r), each expert's least-squares answer to shared rows V (r, in).

    U_e = W_e C_e V^T (V C_e V^T)^+; the loss is then tr W_e C_e W_e^T - tr U_e V C_e V^T U_e^T.
    """
    columns = []
    for e, weight in enumerate(stack):
        seen = moments.of(e, stack.device) @ rows.mT
        inverse = torch.linalg.pinv(rows @ seen, hermitian=True)
        columns.append(weight.double() @ seen @ inverse)
    return torch.stack(columns)


def own_columns(stack: Tensor, rows: Tensor, moments: Moments) -> Tensor:
    """Return U_e Sigma_e (E, out, r) of each expert's own whitened SVD, next to rows not its own.

    The sign of a pair of singular vectors is free; it is taken to agree with the shared row.
    """
    rank, columns = len(rows), []
    for e, weight in enumerate(stack):
        moment = moments.of(e, stack.device)
        values, u, v = principal(weight.double(), moment)
        sign = torch.where(((v[:rank] @ moment) * rows).sum(dim=1) < 0, -1.0, 1.0)
        columns.append(u[:, :rank] * (values[:rank].sqrt() * sign))
    return torch.stack(columns)


def mixtures(columns: Tensor, share: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` columns and weights (E, count) whose mixtures come closest to all U_e.

    Args:
        columns: U (E, out, r), for rows with V C V^T = 1.
        share: how much each expert's error counts (E,).
        count: k.

    Returns:
        U (k, out, r) and the least-squares weights (E, k).
    """
    flat = columns.flatten(1)
    weighted = flat * share.to(flat).sqrt().unsqueeze(1)
    top = torch.linalg.eigh(weighted @ weighted.mT).eigenvectors.flip(1)[:, :count]
    few = top.mT @ weighted
    mix = flat @ few.mT @ torch.linalg.pinv(few @ few.mT, hermitian=True)
    return few.unflatten(1, columns.shape[1:]), mix


def most_used(columns: Tensor, count: Tensor, few: int) -> tuple[Tensor, Tensor]:
    """Return the U of the `few` most used experts, and how every expert mixes them.

    Expert i takes the mean, weighted by use, of those that are used at least as much as i.

    Args:
        columns: U (E, out, r).
        count: tokens of each expert (E,).
        few: k.

    Returns:
        U (k, out, r) and weights (E, k).
    """
    top = torch.argsort(count, descending=True, stable=True)[:few]
    used = count.double().clamp(min=1e-9)
    mix = used[top] * (used[top] >= used.unsqueeze(1))
    return columns[top.to(columns.device)], mix / mix.sum(dim=1, keepdim=True)
