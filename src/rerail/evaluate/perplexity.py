"""Held-out text: NLL, KL to the teacher, top-1 agreement and routing, in one forward a block."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.evaluate.active import Active, counting
from rerail.evaluate.routing import Routing, tracing
from rerail.moe.model import MoEModel
from rerail.parallel import gathered, part
from rerail.teacher.kl import kl_of, log_distribution

Batch = tuple[Tensor, Tensor]
Progress = Callable[[Sequence[Batch]], Iterable[Batch]]


@dataclass(frozen=True)
class BlockScores:
    """Sums over the targets of each block, float64 (N,), so that differences can be paired.

    Attributes:
        nll: negative log-likelihood in nats.
        tokens: number of targets.
        kl: forward KL from the teacher, in nats.
        agree: how often the most likely token is the teacher's.
        hidden: final hidden states (N, S, H) where they were asked for.
        routing: chosen slots of every token.
        active: experts computed for a token and layer, on average.
    """

    nll: Tensor
    tokens: Tensor
    kl: Tensor
    agree: Tensor
    hidden: Tensor | None
    routing: Routing
    active: float


@torch.no_grad()
def score_blocks(
    model: MoEModel,
    batches: Sequence[Batch],
    teacher: Tensor | None = None,
    progress: Progress = lambda b: b,
    chunk: int = 512,
) -> BlockScores:
    """Score a text by a model.

    In a group of processes all must call it, and each scores its part of the batches; what comes
    back is that of one process, to the bit.

    Args:
        model: teacher or student.
        batches: (input_ids (B, S), mask (B, S)).
        teacher: the teacher's final hidden states (N, S, H) on the same blocks; None where the
            model is the teacher itself (KL 0, agreement 1), whose states are then returned.
        progress: wraps the batches.
        chunk: tokens whose logits exist at once.
    """
    rows: list[Tensor] = []
    states: list[Tensor] = []
    device = next(model.model.parameters()).device
    begin, mine = part(batches)
    done = sum(len(ids) for ids, _ in batches[:begin])
    with tracing(model) as routing, counting(model) as active:
        for ids, mask in progress(mine):
            routing.mask = active.mask = mask
            hidden = model.hidden(ids.to(device), mask.to(device))
            theirs = hidden if teacher is None else teacher[done : done + len(ids)].to(hidden)
            here = (ids.to(hidden.device), mask.to(hidden.device))
            rows.append(_batch_sums(model, *here, hidden, theirs, chunk))
            if teacher is None:
                states.append(hidden.cpu())
            done += len(ids)
    parts = gathered((rows, states, routing.chosen, active))
    nll, kl, agree, tokens = torch.cat([t for part_rows, *_ in parts for t in part_rows]).unbind(1)
    states = [t for _, part_states, *_ in parts for t in part_states]
    for i in routing.chosen:
        routing.chosen[i] = [t for *_, chosen, _ in parts for t in chosen[i]]
    kept = torch.cat(states) if states else None
    computed = Active.of_all([active for *_, active in parts])
    return BlockScores(nll, tokens, kl, agree, kept, routing, computed.mean)


def _batch_sums(
    model: MoEModel, ids: Tensor, mask: Tensor, hidden: Tensor, teacher: Tensor, chunk: int
) -> Tensor:
    """Return float64 (B, 4): NLL, KL, agreement and count of targets, summed over each block."""
    valid = mask[:, 1:]
    block = torch.arange(len(ids), device=ids.device)[:, None].expand_as(valid)[valid]
    targets = ids[:, 1:][valid]
    sums = torch.zeros(len(ids), 4, dtype=torch.float64, device=ids.device)
    states = hidden[:, :-1][valid], teacher[:, :-1][valid]
    pieces = (torch.split(x, chunk) for x in (*states, targets, block))
    for s, t, y, b in zip(*pieces, strict=True):
        log_s, log_t = (log_distribution(model.head(x)) for x in (s, t))
        nll = -log_s.gather(1, y[:, None]).squeeze(1).double()
        agree = (log_s.argmax(-1) == log_t.argmax(-1)).double()
        found = [nll, kl_of(log_t, log_s).double(), agree, torch.ones_like(nll)]
        sums.index_add_(0, b, torch.stack(found, dim=1))
    return sums.cpu()
