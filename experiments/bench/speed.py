"""Speed: statistics against a plain forward, a Router KD step against its floor, the chunked KL."""

from functools import partial
from typing import Any

import torch
from models import Batch, Size, head_share, random_model, reap_student, text
from planning import presets
from timing import Row, interleaved, ratio, row
from torch import Tensor
from torch.nn import functional as F

from rerail.compress.guard import MaxOutput
from rerail.compress.templates.skipper import GateTails
from rerail.config.presets import preset
from rerail.distill.router_distillation import RouterDistillation
from rerail.distill.settings import RouterKD
from rerail.distill.trainable import master_copies
from rerail.methods.d2_moe import Fisher
from rerail.methods.easy_ep import Deviation
from rerail.methods.m_smoe import LogitGram
from rerail.methods.moe_i2 import LossIncrease
from rerail.methods.moe_svd import OutlierShare
from rerail.methods.mone import GatedOutput, OutputSquares
from rerail.methods.pmq import RouterMass
from rerail.methods.reap import MomentScore
from rerail.moe.model import MoEModel
from rerail.statistics.collect import collect
from rerail.statistics.dense import OutputSum, TokenCount
from rerail.statistics.moments import InputMoment, MiddleMoment
from rerail.statistics.routed import Count, Moment, OutputSumRouted
from rerail.statistics.squares import MiddleEnergy, MiddlePeak
from rerail.statistics.statistic import Statistic
from rerail.teacher.hidden_states import CachedTeacher, LiveTeacher, final_hidden_states
from rerail.teacher.kl import Head, chunked_kl

MOMENTS = (Count(), *(Moment(a, p) for a in range(3) for p in range(3)))
STATISTICS: dict[str, tuple[tuple[Statistic, ...], float]] = {
    "statistics for REAP": (MomentScore().requires, 1.3),
    "counts and all moments g^a n^p": (MOMENTS, 1.6),
}
UNION: tuple[Statistic, ...] = (
    *MOMENTS,
    Deviation(),
    MaxOutput(),
    OutputSumRouted(),
    OutputSquares(),
    GatedOutput(2),
    InputMoment(),
    MiddleMoment(),
    MiddleEnergy(),
    MiddlePeak(),
    LogitGram(),
    RouterMass(),
    OutlierShare(),
    GateTails(),
)
BATCHES = 4  # of the text for the union: its gigabytes of sums are laid out once a pass


def union() -> tuple[Statistic, ...]:
    """Return every routed statistic that a preset with a single pass reads, and those of UNION."""
    compressors = [preset("compressor", name) for name in presets()]
    read = [s for c in compressors if c.driver == "one_shot" for s in c.requires]
    return tuple(dict.fromkeys([*UNION, *(s for s in read if s.pass_name == "routed")]))


def differing_logits(model: MoEModel, batch: Batch, statistics: tuple[Statistic, ...]) -> int:
    """Return how many logits of a pass that measures differ from a plain forward in any bit."""
    states: list[Tensor] = []
    hook = model.model.base_model.register_forward_hook(
        lambda _module, _arguments, out: states.append(out.last_hidden_state)
    )
    collect(model, [batch], statistics)
    hook.remove()
    with torch.no_grad():
        plain = model.model(input_ids=batch[0], use_cache=False).logits
        return int((model.head(states[0]) != plain).sum())


def statistics_rows(name: str, model: MoEModel, size: Size, rounds: int, limits: bool) -> list[Row]:
    """Both sides run the body only, without the head."""
    batch = text(model, size)
    work: dict[str, Any] = {"plain": partial(torch.no_grad()(model.hidden), *batch)}
    work |= {label: partial(collect, model, [batch], s) for label, (s, _) in STATISTICS.items()}
    times = interleaved(work, rounds)
    rows = []
    for label, (statistics, limit) in STATISTICS.items():
        value = ratio(times, label, plain=1)
        rows.append(row(f"{name}: {label} / plain forward", value, limit if limits else None))
        differing = differing_logits(model, batch, statistics)
        rows.append(row(f"{name}: {label}, logits that differ", differing, 0, "count"))
    return rows


def union_rows(name: str, model: MoEModel, size: Size, rounds: int, limits: bool) -> list[Row]:
    """Every routed statistic there is, input and middle moments included."""
    batch, statistics = text(model, size), union()
    plain = torch.no_grad()(lambda: [model.hidden(*batch) for _ in range(BATCHES)])
    work = {"plain": plain, "union": partial(collect, model, [batch] * BATCHES, statistics)}
    times = interleaved(work, (rounds + 1) // 2)
    value, differing = ratio(times, "union", plain=1), differing_logits(model, batch, statistics)
    return [
        row(f"{name}: all routed statistics / plain forward", value, 2.5 if limits else None),
        row(f"{name}: all routed statistics, logits that differ", differing, 0, "count"),
    ]


def other_passes_rows(
    name: str, model: MoEModel, size: Size, rounds: int, limits: bool
) -> list[Row]:
    """The dense pass against E / K times the experts alone; backward and ablation for the record.

    The ablation pass is that of one layer on one short sequence.
    """
    batch = text(model, size)
    short = [(batch[0][:1, :32], batch[1][:1, :32])]
    calls: list[tuple[Any, Any]] = []
    hooks = [
        layer.experts.register_forward_pre_hook(lambda *call: calls.append(call))
        for layer in model.layers
    ]
    plain = torch.no_grad()(lambda batch: model.hidden(*batch))
    plain(batch)
    for hook in hooks:
        hook.remove()
    work: dict[str, Any] = {
        "plain": partial(plain, batch),
        "experts": torch.no_grad()(lambda: [module(*inputs) for module, inputs in calls]),
        "dense": partial(collect, model, [batch], [OutputSum(), TokenCount()]),
        "backward": partial(collect, model, [batch], [Fisher()]),
    }
    times = interleaved(work, (rounds + 1) // 2)
    ablate = partial(collect, model, short, [LossIncrease()], layers=[model.layers[-1].index])
    short_times = interleaved({"short": partial(plain, short[0]), "ablation": ablate}, 1)
    layer = model.layers[0]
    dense = ratio(times, "dense", experts=layer.num_experts / layer.top_k)
    return [
        row(f"{name}: dense statistics / E/K forwards of the experts", dense,
            1.3 if limits else None),
        row(f"{name}: Fisher / plain forward", ratio(times, "backward", plain=1)),
        row(f"{name}: loss without each slot of a layer / E + 1 plain forwards",
            ratio(short_times, "ablation", short=layer.num_experts + 1)),
    ]  # fmt: skip


def step(module: RouterDistillation, optimiser: torch.optim.Optimizer, batch: Batch) -> None:
    """One optimiser step, as in a repair."""
    ids, mask = batch
    module.loss({"input_ids": ids, "mask": mask, "index": torch.arange(len(ids))}).backward()
    optimiser.step()
    optimiser.zero_grad()


def router_kd_rows(
    name: str, teacher: MoEModel, size: Size, rounds: int, limits: bool
) -> list[Row]:
    """The floor of a step: teacher (live) or its head (cached), and the student there and back."""
    batch = text(teacher, size)
    student = reap_student(teacher, batch)
    sources = {
        "live": LiveTeacher(teacher),
        "cached": CachedTeacher(final_hidden_states(teacher, [batch])),
    }
    plain = torch.no_grad()(lambda model: model.model(input_ids=batch[0], use_cache=False))
    with master_copies(student, "router_rows") as trained:
        work: dict[str, Any] = {
            "teacher": lambda: plain(teacher),
            "student": lambda: plain(student),
        }
        for kind, source in sources.items():
            module = RouterDistillation(student, source, RouterKD(), trained, 1)
            optimiser = torch.optim.AdamW(trained.values(), lr=5e-5)
            work[kind] = partial(step, module, optimiser, batch)
        times = interleaved(work, rounds)
    share = head_share(teacher, size.length)
    limit = 1.25 if limits else None
    return [
        row(f"{name}: head's share h of a plain forward, from shapes", share, None, "share"),
        row(f"{name}: student / teacher, plain forward", ratio(times, "student", teacher=1)),
        row(f"{name}: Router KD step, live teacher / floor of 3 forwards",
            ratio(times, "live", teacher=1, student=2), limit),
        row(f"{name}: Router KD step, cached teacher / floor of 2 + h forwards",
            ratio(times, "cached", teacher=share, student=2), limit),
    ]  # fmt: skip


def plain_kl(student: Tensor, teacher: Tensor, weights: Tensor, head: Head) -> Tensor:
    """The KL as autograd computes it from full logits: what the chunked one replaces."""
    with torch.no_grad():
        target = torch.log_softmax(head(teacher), dim=-1)
    log_s = torch.log_softmax(head(student), dim=-1)
    return (weights * F.kl_div(log_s, target, reduction="none", log_target=True).sum(-1)).sum()


KL = {"plain": plain_kl, "chunked": chunked_kl}


def kl_case(size: Size) -> tuple[Tensor, Tensor, Tensor, Head]:
    """Return student and teacher states (tokens, H), weights (tokens,) and a model's own head."""
    shape = Size(size.hidden, 32, 2, 1, 1, size.kl_vocabulary)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, size.kl_tokens, size.hidden, generator=generator)
    weights = torch.full((size.kl_tokens,), 1 / size.kl_tokens)
    return states[0], states[1], weights, random_model(shape).head


def gradient_of(kind: str, case: tuple[Tensor, Tensor, Tensor, Head]) -> tuple[Tensor, Tensor]:
    student = case[0].clone().requires_grad_()
    loss = KL[kind](student, *case[1:])
    loss.backward()
    assert student.grad is not None
    return loss.detach(), student.grad


def kl_rows(size: Size, rounds: int) -> list[Row]:
    case = kl_case(size)
    times = interleaved({kind: partial(gradient_of, kind, case) for kind in KL}, rounds)
    (loss, gradient), (ours, our_gradient) = (gradient_of(kind, case) for kind in KL)
    apart = (our_gradient - gradient).abs().max() / gradient.abs().max()
    return [
        row("chunked KL: time / plain", ratio(times, "chunked", plain=1), 1.0),
        row("chunked KL: loss, relative error", float((ours - loss).abs() / loss), 1e-5, "share"),
        row("chunked KL: gradient, largest error / largest entry", float(apart), 1e-5, "share"),
    ]
