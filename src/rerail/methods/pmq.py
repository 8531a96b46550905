"""PMQ, the bit allocation of MC (Mixture Compressor, arXiv 2410.06270, section 3 and appendix A).

Experts of one layer share a budget of bits. Expert e gets b_e out of `bits`, so as to minimise

    sum_e phi_e^alpha w_e^beta eps_{e,b_e}^gamma    with  sum_e b_e <= E * average,

    phi_e = n_e / T                         frequency (E,): n_e of T tokens choose e
    w_e   = 1/T sum_{t: e in S_t} p_te      routing mass (E,), S_t the chosen slots of token t
    eps   = || F(X) - F_{e,b}(X) ||_F       (E, B): F is the routed output of the layer on sampled
                                            rows X (T', H), F_{e,b} with only e in b bits

by exact dynamic programming, and is then quantised by `quantiser`. With the routing fixed only
tokens of e differ: eps^2 = sum_{t: e in S_t} g_te^2 ||E_e(x_t) - E_{e,b}(x_t)||^2, so one forward
for each b gives all experts. Never-routed experts cost nothing and get the fewest bits.

Paper and code:
* exponents: alpha, beta, gamma are 1, 1, 2 in the paper; the code's defaults are 1, 1.5, 2, but it
  raises eps to alpha, so they act as 1, 1.5, 1 (`exponents=repo`).
* w: p is the softmax over all E before renormalisation (code), on routers of another kind the
  score that takes its place, without bias or scaling; `mass=gates`: the weights used.
* eps: the trial quantiser is round to nearest (code; a note on the paper says GPTQ); the code adds
  up the norms of batches (`batch` rows each), by default here it is one norm over all rows.
* budget: sum = E * average in the paper, <= in the code and here; at least one expert each has 2
  and 3 bits (`min_counts`), which keeps averages under (E+3)/E out of reach: here if E <= 16.
* attention and router take 4 bits in the paper; here both stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rerail.compress.base import Compressor, Decision
from rerail.compress.solvers.bit_allocation import allocate_bits, block_errors, least_sum
from rerail.compress.templates.quantiser import WIDTHS, Quantiser, quantised
from rerail.errors import InputError, OutOfReach
from rerail.experts.quantized import DENSE
from rerail.moe.model import MoELayer
from rerail.plan.budget import Bits, Budget, numbers_kept
from rerail.statistics.routed import Count, Moment
from rerail.statistics.statistic import LayerStatistics, RoutedStatistic, RoutedTokens, Statistic
from rerail.statistics.token_sample import TokenSample

EXPONENTS = {"paper": (1.0, 1.0, 2.0), "repo": (1.0, 1.5, 1.0)}


@dataclass(frozen=True)
class RouterMass(RoutedStatistic):
    """sum over X_e of p_e, p (E,) the router's scores before top-k. float64 (E,)."""

    axes = "E"
    needs = frozenset({"scores"})

    def measure(self, tokens: RoutedTokens) -> Tensor:
        assert tokens.scores is not None
        return tokens.sum_by_expert(tokens.scores.gather(1, tokens.index))


@dataclass(frozen=True, kw_only=True)
class PMQ(Compressor):
    """Shares bits out among the experts of a layer, most to those whose loss costs most.

    Attributes:
        quantiser: what encodes the experts once their bits are known.
        bits: the candidate widths.
        exponents, mass: see above.
        min_counts: fewest experts of each width; None is 0, 1, 1 for bits 1, 2, 3 and E <= 16.
        rows, batch: T', and how many of them share a norm.
        run: `stored` decodes chosen experts in every forward; `materialised` keeps all decoded.
    """

    quantiser: Quantiser
    bits: Sequence[int] = (1, 2, 3)
    exponents: Literal["paper", "repo"] = "paper"
    mass: Literal["router", "gates"] = "router"
    min_counts: Sequence[int] | None = None
    rows: int = 4096
    batch: int | None = None
    run: Literal["stored", "materialised"] = "stored"

    paradigm: ClassVar[str] = "quantisation"
    paper: ClassVar[str] = "arXiv 2410.06270"
    budget: ClassVar[type[Budget]] = Bits
    allocations: ClassVar[Literal["any", "fixed", "uniform"]] = "uniform"

    @property
    def written_out(self) -> Literal["no", "yes", "never"]:
        return "yes"

    def __post_init__(self) -> None:
        some, needs = list(self.bits), self.min_counts
        if not some or some != sorted(set(some) & set(WIDTHS)):
            raise InputError(f"compressor.bits={some} must be ascending and out of {list(WIDTHS)}")
        if needs is not None and (len(needs) != len(some) or min(needs) < 0):
            raise InputError(f"compressor.min_counts={needs} must be one count for each of {some}")

    @property
    def requires(self) -> tuple[Statistic, ...]:
        own: tuple[Statistic, ...] = (Count(), self.mass_read, TokenSample(self.rows))
        return tuple(dict.fromkeys(own + self.quantiser.requires))

    @property
    def mass_read(self) -> Statistic:
        return RouterMass() if self.mass == "router" else Moment(1, 0)

    def least(self, experts: int) -> list[int]:
        """Return the fewest experts of each candidate width."""
        if self.min_counts is not None:
            return list(self.min_counts)
        paper = experts <= 16 and tuple(self.bits) == (1, 2, 3)
        return [0, 1, 1] if paper else [0] * len(self.bits)

    def count(self, layer: MoELayer, removed: float) -> int:
        """Return the bits that a layer's experts share.

        The cheapest assignment must fit, and the average may not be above all candidates.
        """
        needs, average = self.least(n := layer.num_experts), DENSE * (1 - removed)
        lowest = least_sum(n, self.bits, needs) / n
        if sum(needs) > n or not lowest - 1e-9 <= average <= self.bits[-1] + 1e-9:
            raise OutOfReach(
                f"PMQ cannot reach {average:g} bits on average: at least {needs} of {n} "
                f"experts have {list(self.bits)}; allowed: {lowest:.4g} to {self.bits[-1]}"
            )
        return numbers_kept(DENSE * n, removed)

    def decide_layer(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Decision:
        hidden = TokenSample.hidden(statistics[TokenSample(self.rows)])
        error = block_errors(layer, hidden, self.bits, self.quantiser.group, self.batch)
        cost = self.cost(statistics[Count()], statistics[self.mass_read], error, layer.top_k)
        bits = allocate_bits(cost, self.bits, count, self.least(layer.num_experts))
        return quantised(layer, statistics, bits, self.quantiser, self.run)

    def cost(self, count: Tensor, mass: Tensor, error: Tensor, top_k: int) -> Tensor:
        """Return phi^alpha w^beta eps^gamma, float64 (E, B)."""
        (alpha, beta, gamma), tokens = EXPONENTS[self.exponents], float(count.sum()) / top_k
        phi, w = (t.double().cpu() / max(1.0, tokens) for t in (count, mass))
        return (phi**alpha * w**beta).unsqueeze(1) * error.double().cpu() ** gamma
