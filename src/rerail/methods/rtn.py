"""Round to nearest: the baseline of all quantisers (also MC's trial quantiser, arXiv 2410.06270).

For each row of W (out, in) and each group of G numbers along `in`, with b > 1 bits,

    scale = (max - min) / (2^b - 1),   zero = round(-min / scale),   code = round(W / scale) + zero

clamped to 0 .. 2^b - 1; min and max are widened to hold 0, as GPTQ's and MC's code do (papers write
plain min and max), so that 0 is exact and zeros are integers. One bit is sign(W) * mean |W|: the
MC paper takes the mean over the matrix, its code over each group of a row; here the latter.
A group of zeros stays 0. Needs no data.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rerail.compress.solvers.rounding import round_to_nearest
from rerail.compress.templates.quantiser import Quantiser
from rerail.experts.quantized import Coded


@dataclass(frozen=True, kw_only=True)
class RTN(Quantiser):
    """Rounds every number to its nearest code."""

    paper: ClassVar[str] = "baseline (round to nearest)"

    def encode(self, stack: Tensor, moment: Tensor | None, bits: int) -> Coded:
        return round_to_nearest(stack, bits, self.group)
