"""Whitened SVD of each expert matrix: SVD-LLM's core (arXiv 2403.07378, section 3.1).

An expert matrix W_e (out, in) becomes U_e V_e, U (out, r), V (r, in), such that what it answers on
the text changes least: with C_e (in, in) the mean of x x^T over the tokens routed to e (x the
block's input for gate and up, the middle activation h for down)

    W'_e = U_e U_e^T W_e,   U_e = the r top eigenvectors of W_e C_e W_e^T,
    loss = tr (W_e - W'_e) C_e (W_e - W'_e)^T = the sum of the dropped eigenvalues.

The paper takes the SVD of W L with C = L L^T (Cholesky) and multiplies by L^-1; its code adds
(1e-6 - lambda_min) to the diagonal where Cholesky fails. The matrix is the same, but here nothing
is inverted, C may be singular, and the ridge is relative (`ridge`). The code splits the singular
values evenly between U and V; here V holds them. Experts that saw few tokens lean on the layer's
moment (`shrink`, ours), those that saw none have only that. The code's second step, a refit of U on
outputs of the compressed prefix, is left out. `whiten=false` is plain SVD of the weights, without
any text.

Ranks (`spread`): `uniform`, or `spectrum` as D-Rank (arXiv 2509.25622) shares them out,
r_e ~ sqrt(exp(H(pi_e)) / (out + in)) with pi_e the normalised whitened spectrum. Public code rounds
r = int(out in kept / (out + in)) down for each matrix; here the remainders are given out too, so
that the layer's budget is used to within out + in numbers.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rerail.compress.solvers import whitening
from rerail.compress.templates.factoriser import Factoriser
from rerail.moe.model import MoELayer
from rerail.statistics.statistic import LayerStatistics, Statistic


@dataclass(frozen=True, kw_only=True)
class WhitenedSVD(Factoriser):
    """Replaces each matrix by the factors that change its answers least.

    Attributes:
        spread: how ranks compare inside a layer: `uniform` or by `spectrum`.
        whiten: weigh errors by the text; false is plain SVD, without data.
        shrink, ridge: how moments are made safe, see `whitening.Moments`.
    """

    spread: Literal["uniform", "spectrum"] = "uniform"
    whiten: bool = True
    shrink: float = 0.25
    ridge: float = 1e-6

    paper: ClassVar[str] = "arXiv 2403.07378"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return whitening.moment_statistics(self.whiten)

    def scores(self, layer: MoELayer, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return roots of effective ranks, or nothing."""
        if self.spread == "uniform":
            return {}
        moments, stacks = self.moments(layer, statistics), layer.stack()._asdict()
        return {n: whitening.effective_ranks(w, moments[n]).sqrt() for n, w in stacks.items()}

    def moments(self, layer: MoELayer, statistics: LayerStatistics) -> dict[str, whitening.Moments]:
        return whitening.layer_moments(layer, statistics, self.whiten, self.shrink, self.ridge)
