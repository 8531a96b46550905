"""The true next-token loss of a text."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rerail.moe.model import MoEModel

_CHUNK = 512  # tokens whose logits over the vocabulary are in memory at one time


def summed_loss(model: MoEModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """Return the summed negative log-likelihood of blocks (B, S) in nats, and the targets summed.

    Position t predicts token t + 1: labels are shifted here and nowhere else. Masked tokens are no
    targets.
    """
    hidden = model.hidden(ids, mask)
    valid = mask[:, 1:]
    states, targets = hidden[:, :-1][valid], ids[:, 1:][valid]
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for s, y in zip(torch.split(states, _CHUNK), torch.split(targets, _CHUNK), strict=True):
        total = total + F.cross_entropy(model.head(s).float(), y, reduction="sum").double()
    return total, len(targets)
