"""ODP: MC's online dynamic pruning, skipping with protected tokens (arXiv 2410.06270, section 3.3).

Per layer, mu is the median over calibration tokens of w_2 / w_1, w_1 >= w_2 the gate weights. A
token drops its second expert iff w_2 / w_1 < mu and it is not protected; kept weights are
renormalised. Protected are the top `protect` of the tokens of a sequence (rounded up) by

    I_j = ||x_j||_1 * sum_{i >= j} A_ij / (number of i >= j)

with x_j (H,) the input of the experts and A (queries, keys) the layer's attention, heads averaged:
a mean of what token j *receives*. Tails stand for ratios, so that K > 2 works too: slot i >= 2 is
skipped iff (w_i + ... + w_K) / (w_1 + ... + w_K) < threshold, the median of all such tails.

Where paper and code differ. The code sums the map over keys, which is 1 for every token, so that it
favours late tokens; its betas are NAEE's published medians for Mixtral; it skips in the 10 least
sensitive layers only; it takes batches of one. None of that is followed. Neither says whether a
set of several sequences is ranked as a whole: here each sequence is, and padding never counts.

Attention weights exist under eager attention only: a student with this policy is switched to it. A
layer without attention weights (a convolution, a flash kernel) protects nothing and says so. Nor is
a token protected while decoding with a cache, where it has no later queries yet. Thresholds do not
know of protection, so a little less is skipped than a `Skip(share)` asks for; the run reports it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rerail.compress.templates.skipper import Skipper
from rerail.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ODP(Skipper):
    """Skips small gate weights, but not of tokens that receive much attention.

    Attributes:
        protect: share of a sequence's tokens that keep all their experts.
    """

    protect: float = 0.02

    paper: ClassVar[str] = "arXiv 2410.06270"

    def __post_init__(self) -> None:
        if not 0 <= self.protect <= 1:
            raise InputError(f"compressor.protect={self.protect} is outside [0, 1]")

    def policy_options(self) -> Mapping[str, str]:
        return {"protect": repr(float(self.protect))}
