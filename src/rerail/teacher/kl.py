"""The forward KL from teacher to student over the whole vocabulary, a few tokens at a time.

    L = tau^2 * sum_t w_t KL( softmax(z_T,t / tau) || softmax(z_S,t / tau) ),     z = head(h)

Its gradient has a closed form at the logits, dL/dz_S = tau w (p_S - p_T), which is carried back
through the model's own head chunk by chunk. A full (tokens, V) tensor never exists (arXiv
2603.02217, eq. 1-3; routing objective of section 4).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]


def target_weights(mask: Tensor, average: str = "sequence", eps: float = 1e-8) -> Tensor:
    """Return float32 (B, S-1): the weight of the KL at position t, whose target is t + 1.

    Args:
        mask: (B, S) bool, true where a token is real.
        average: `sequence` divides by each sequence's own targets, then by B (the paper's N_x);
            `token` divides by all targets of the batch.
        eps: keeps an empty sequence finite.
    """
    targets = mask[:, 1:].float()
    if average == "token":
        return targets / (targets.sum() + eps)
    return targets / (targets.sum(dim=1, keepdim=True) + eps) / len(mask)


def token_kl(
    student: Tensor, teacher: Tensor, head: Head, temperature: float, chunk: int
) -> Tensor:
    """Return float32 (N,): tau^2 KL of each token, from hidden states (N, H) of both. No gradient."""
    parts = []
    with torch.no_grad():
        for s, t in zip(student.split(chunk), teacher.split(chunk), strict=True):
            parts.append(kl_and_logs(s, t, head, temperature)[0])
    return torch.cat(parts) if parts else student.new_zeros(0, dtype=torch.float32)


def kl_and_logs(
    student: Tensor, teacher: Tensor, head: Head, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tau^2 KL (n,), and both log-distributions (n, V)."""
    log_t = torch.log_softmax(head(teacher).float() / tau, dim=-1)
    log_s = torch.log_softmax(head(student).float() / tau, dim=-1)
    kl = (log_t.exp() * (log_t - log_s)).sum(dim=-1)
    return tau**2 * kl, log_s, log_t


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        weights: Tensor,
        head: Head,
        tau: float,
        chunk: int,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student)
        pieces = (t.split(chunk) for t in (student, teacher, weights, gradient))
        for s, t, w, g in zip(*pieces, strict=True):
            log_t = torch.log_softmax(head(t).float() / tau, dim=-1)
            with torch.enable_grad():
                state = s.detach().requires_grad_()
                logits = head(state)
            log_s = torch.log_softmax(logits.detach().float() / tau, dim=-1)
            p_t = log_t.exp()
            total += (w * (p_t * (log_t - log_s)).sum(dim=-1)).sum().double()
            d_logits = log_s.exp_().sub_(p_t).mul_(tau * w.unsqueeze(1)).to(logits.dtype)
            (g_s,) = torch.autograd.grad(logits, state, d_logits)
            g.copy_(g_s)
        ctx.save_for_backward(gradient)
        return (tau**2 * total).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None, None


def chunked_kl(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    head: Head,
    *,
    temperature: float = 1.0,
    chunk: int = 128,
) -> Tensor:
    """Return tau^2 sum_n w_n KL_n as a scalar whose gradient reaches `student` only.

    Args:
        student: final hidden states (N, H) of the student.
        teacher: the teacher's, (N, H); no gradient flows to it.
        weights: (N,) as from `target_weights`; tokens of weight zero should be left out.
        head: the frozen head, hidden states -> logits.
        temperature: tau.
        chunk: tokens at a time; the peak memory is a few (chunk, V) tensors.
    """
    out: Tensor = _ChunkedKL.apply(student, teacher, weights, head, temperature, chunk)  # type: ignore[no-untyped-call]
    return out
