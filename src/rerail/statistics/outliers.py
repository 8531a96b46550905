"""How peaky the inputs of experts are (MoE-SVD's outlier ratio)."""

from dataclasses import dataclass

from torch import Tensor

from rerail.statistics.routed import SlotScalars
from rerail.statistics.statistic import RoutedTokens


@dataclass(frozen=True)
class OutlierShare(SlotScalars):
    """sum over X_e of the share of entries with |x_j| > threshold * mean_j |x_j|. float64 (E,).

    MoE-SVD takes the mean over all activations of an expert; here it is the token's own, so that
    one pass suffices and batches do not matter.
    """

    threshold: float = 2.0

    @property
    def name(self) -> str:
        """`outlier_share_<threshold>`."""
        return f"outlier_share_{self.threshold:g}"

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Add up this batch."""
        size = tokens.hidden.float().abs()
        peaks = size > self.threshold * size.mean(dim=1, keepdim=True)
        share = peaks.double().mean(dim=1, keepdim=True)
        return tokens.sum_by_expert(share.expand(tokens.index.shape))
