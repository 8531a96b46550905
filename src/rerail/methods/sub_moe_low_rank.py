"""Low rank inside merged experts: the second half of Sub-MoE (arXiv 2506.23266, eq. 10-12).

The experts of a group c are seen through what reaches them. With C_e = S_e
S_e^T the mean of x x^T at expert e (the block's input for gate and up, the middle activation for
down), f_e the merger's weights,

    [W_1 S_1 | ... | W_m S_m] = U Sigma [V_1 | ... | V_m]^T
    V = sum_e f_e V_e S_e^-1 / sum_e f_e,    W = U_r Sigma_r V_r^T

Since U_r Sigma_r V_e^T S_e^-1 = U_r U_r^T W_e, the matrix is U_r U_r^T sum_e f_e W_e / sum_e f_e
with U_r the top eigenvectors of sum_e W_e C_e W_e^T: nothing is inverted. U_r (out, r) and U_r^T W
(r, in) are stored. At full rank it is the merger alone.

Each merged expert loses the share `inner` of its numbers (the paper's 10, 20, 30 %), the merger the
rest. Ours: M is rounded up and ranks take up what is left of the budget; `merger` may be another
than Sub-MoE, whose own `solve` (an alignment, say) is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

from rerail.compress.templates.low_rank_merger import LowRankMerger


@dataclass(frozen=True, kw_only=True)
class SubMoELowRank(LowRankMerger):
    """Sub-MoE's second half, behind a merger that groups experts."""

    paper: ClassVar[str] = "arXiv 2506.23266"
