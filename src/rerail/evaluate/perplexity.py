"""Held-out text: NLL, KL, ESAP and top-1 agreement, and routing, in one forward a block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rerail.evaluate.routing import Routing, record_routing
from rerail.moe.model import MoEModel
from rerail.parallel import gather, my_share
from rerail.statistics.collect import Batch, Progress
from rerail.teacher.kl import esap_of, kl_of, log_distribution


@dataclass(frozen=True)
class BlockScores:
    """Sums over the targets of each of N blocks, so that differences can be paired by block.

    Attributes:
        nll: float64 (N,), negative log-likelihood in nats.
        tokens: float64 (N,), number of targets.
        kl: float64 (N,), forward KL from the teacher, in nats.
        esap: float64 (N,), sum_v min(p_teacher, p_student), see `rerail.teacher.kl.esap_of`.
        agree: float64 (N,), number of targets whose most likely token is the teacher's.
        hidden: (N, S, H), final hidden states of a teacher; None for a student.
        routing: chosen slots of every token.
    """

    nll: Tensor
    tokens: Tensor
    kl: Tensor
    esap: Tensor
    agree: Tensor
    hidden: Tensor | None
    routing: Routing


@torch.no_grad()
def score_blocks(
    model: MoEModel,
    batches: Sequence[Batch],
    teacher: Tensor | None = None,
    progress: Progress = lambda b: b,
    chunk: int = 512,
) -> BlockScores:
    """Score a text by a model.

    In a group of processes all must call it, and each scores its share of the batches. The result
    is that of one process, bit for bit: batches stay whole and come back in their order.

    Args:
        model: teacher or student.
        batches: (input_ids (B, S), mask (B, S)).
        teacher: the teacher's final hidden states (N, S, H) on the same blocks; None where the
            model is the teacher itself (KL 0, ESAP and agreement 1), whose states are
            then returned.
        progress: wraps the batches, to show how far the scoring is.
        chunk: number of tokens whose logits exist at once; bounds the memory.
    """
    sums: list[Tensor] = []
    states: list[Tensor] = []
    device = next(model.model.parameters()).device
    begin, mine = my_share(batches)
    done = sum(len(ids) for ids, _ in batches[:begin])  # blocks before the next batch
    with record_routing(model) as routing:
        for ids, mask in progress(mine):
            routing.mask = mask
            hidden = model.hidden(ids.to(device), mask.to(device))
            target = hidden if teacher is None else teacher[done : done + len(ids)].to(hidden)
            ids, mask = ids.to(hidden.device), mask.to(hidden.device)  # the last GPU's
            sums.append(_batch_sums(model, ids, mask, hidden, target, chunk))
            if teacher is None:
                states.append(hidden.cpu())
            done += len(ids)
    shares = gather(
        (sums, states, routing.chosen, routing.mass, routing.computed)
    )  # in the order of the ranks
    nll, kl, esap, agree, tokens = torch.cat([t for own, *_ in shares for t in own]).unbind(1)
    states = [t for _, own, *_ in shares for t in own]
    for i in routing.chosen:
        routing.chosen[i] = [t for *_, chosen, _, _ in shares for t in chosen[i]]
        routing.mass[i] = [t for *_, mass, _ in shares for t in mass[i]]
        routing.computed[i] = sum(computed[i] for *_, computed in shares)
    hidden_states = torch.cat(states) if states else None
    return BlockScores(nll, tokens, kl, esap, agree, hidden_states, routing)


def _batch_sums(
    model: MoEModel, ids: Tensor, mask: Tensor, hidden: Tensor, teacher: Tensor, chunk: int
) -> Tensor:
    """Return float64 (B, 5): NLL, KL, ESAP, agreement and count of targets, summed a block."""
    valid = mask[:, 1:]  # position t predicts t + 1
    block = torch.arange(len(ids), device=ids.device)[:, None].expand_as(valid)[valid]
    targets = ids[:, 1:][valid]
    sums = torch.zeros(len(ids), 5, dtype=torch.float64, device=ids.device)
    states = hidden[:, :-1][valid], teacher[:, :-1][valid]
    pieces = (torch.split(x, chunk) for x in (*states, targets, block))
    for s, t, y, b in zip(*pieces, strict=True):  # student, teacher, target, block
        log_s, log_t = (log_distribution(model.head(x)) for x in (s, t))
        nll = -log_s.gather(1, y[:, None]).squeeze(1).double()
        agree = (log_s.argmax(-1) == log_t.argmax(-1)).double()
        kl, esap = kl_of(log_t, log_s).double(), esap_of(log_t, log_s).double()
        columns = [nll, kl, esap, agree, torch.ones_like(nll)]
        # in float64, so that chunks do not show in the sums
        sums.index_add_(0, b, torch.stack(columns, dim=1))
    return sums.cpu()
