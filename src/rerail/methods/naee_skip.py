"""NAEE's dynamic skipping: drop a chosen expert whose gate weight is small (arXiv 2402.14800).

Section 3.3, top-2: with gate weights w_1 >= w_2, the second expert is skipped iff w_2 < beta w_1,
beta the layer's median (code: also mean) of w_2 / w_1 over calibration tokens, and w_1 becomes 1.
Appendix A.2, top-k: the i* = min{i >= 1 : sum_{m > i} w_m <= beta sum_m w_m} largest are kept and
renormalised. Both are one rule here: slot i >= 2 is skipped iff its tail

    t_i = (w_i + ... + w_K) / (w_1 + ... + w_K)  <  threshold,

which for K = 2 is the ratio rule with threshold = beta / (1 + beta).

Where paper, code and this differ. The top-2 rule is strict, A.2 is not; here it is strict, so that
threshold 0 skips nothing. The paper does not say how beta is chosen for K > 2: here it is the
median (or mean) of the tails of ranks 2 to K of all tokens, which is its choice at K = 2 (the mean
ratio and the mean tail differ slightly). Kept weights are scaled to the sum that all K had: that is
1 where the model normalises (as in the paper, Mixtral only), and leaves the total mass of OLMoE or
DeepSeek-V2 as it was. `Skip(share)` puts the threshold at a quantile instead of the rule. The code
needs k = 2 and a patched model, neither holds here.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.templates.skipper import Skipper


@dataclass(frozen=True, kw_only=True)
class NAEESkip(Skipper):
    """Skips a chosen expert whose tail of gate weights is small.

    Attributes:
        beta: what of the calibration tails is the threshold.
    """

    beta: Literal["median", "mean"] = "median"

    paper: ClassVar[str] = "arXiv 2402.14800"

    def threshold(self, tails: Tensor) -> float:
        if self.beta == "median":
            return super().threshold(tails)
        middle = (torch.arange(len(tails), dtype=torch.float64) + 0.5) / len(tails)
        return float((middle * tails).sum() / int(tails.sum()))
