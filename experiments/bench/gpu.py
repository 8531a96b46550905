"""Speed and memory on one GPU, at the shape of Qwen3-30B-A3B with random weights.

`python experiments/bench/gpu.py --out bench_gpu.json [--page experiments/gpu.md] [--minutes 5.5]`

As many layers as leave room for the rest; teacher and REAP student share their experts. Rows are
{name, value, limit, unit}; a measurement that fails leaves {name, error} and the others go on. With
`--small` a toy of the same family runs on a CPU.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from planning import BUDGETS
from timing import Row, row
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from rerail.compress.base import make_plan
from rerail.compress.solvers.bases import start
from rerail.compress.solvers.basis_loss import basis_loss
from rerail.compress.solvers.fitting import best_by_adam
from rerail.config.presets import preset
from rerail.distill.repair import repair
from rerail.distill.settings import RouterKD
from rerail.methods.mobe import MoBE
from rerail.methods.reap import MomentScore
from rerail.moe.model import MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio, dense_numbers, numbers_kept
from rerail.run import rows
from rerail.statistics.collect import collect
from rerail.statistics.moments import InputMoment, MiddleMoment
from rerail.statistics.routed import Count
from rerail.teacher.hidden_states import CachedTeacher, LiveTeacher, Teacher, final_hidden_states
from rerail.teacher.kl import chunked_kl, default_chunk
from rerail.text.calibration import TokenBlocks

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A qwen3_moe model and a text; the defaults are Qwen3-30B-A3B and one batch of 8,192 tokens.

    `deepest` layers is the real model: what is measured on fewer is scaled by layers.
    """

    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    heads: int = 32
    key_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 151_936
    deepest: int = 48
    layers: int = 24
    blocks: int = 16
    length: int = 512
    moment_layers: int = 2
    steps: int = 8
    rounds: int = 5
    matmul: int = 8192
    adam_steps: int = 20

    @property
    def layer_bytes(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.key_heads)
        return 2 * (3 * self.experts * self.hidden * self.intermediate + attention)

    @property
    def tokens(self) -> int:
        return self.blocks * self.length

    def flops(self, layers: int) -> float:
        """Return those of the body's matrix products for one batch, attention's own included."""
        chosen = 3 * self.top_k * self.intermediate + self.experts
        projections = 2 * self.head_dim * (self.heads + self.key_heads)
        looked_at = self.head_dim * self.heads * self.length  # half of the keys, twice
        return 2.0 * self.tokens * layers * (self.hidden * (chosen + projections) + looked_at)


SMALL = Shape(
    32, 16, 8, 2, 4, 2, 8, 128, deepest=4, layers=2, blocks=4, length=16, moment_layers=1, steps=4,
    rounds=2, matmul=64, adam_steps=2,
)  # fmt: skip


@dataclass
class Bench:
    """What the measurements share."""

    shape: Shape
    device: torch.device
    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    model: MoEModel = field(init=False)
    student: MoEModel = field(init=False)
    plain: float = 0.0  # seconds of a plain forward of the body
    kl: float = 0.0  # seconds of the KL of one batch and its gradient
    matmul: float = 0.0  # TFLOP/s

    def add(self, *rows: Row) -> None:
        for r in rows:
            limit = "" if r["limit"] is None else f"  (goal: at most {r['limit']:g})"
            print(f"{r['name']:<72} {r['value']:>12.5g} {r['unit']}{limit}", flush=True)
        self.rows += rows

    def batch(self, seed: int = 0, blocks: int | None = None) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (blocks or self.shape.blocks, self.shape.length)
        ids = torch.randint(0, self.shape.vocabulary, shape, generator=generator)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], rounds: int | None = None) -> float:
        """Return the median of some rounds on the clock, after one that warms up."""
        found = []
        for r in range((rounds or self.shape.rounds) + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            found += [time.perf_counter() - began] if r else []
        return statistics.median(found)

    @contextmanager
    def peak(self, name: str, limit: float | None = None) -> Iterator[None]:
        """Add a row: the memory that a piece of work takes at most beyond what was there, in GB."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.empty_cache()
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield
        self.wait()
        self.add(row(name, (torch.cuda.max_memory_allocated() - before) / GB, limit, "GB"))


def matmul_rows(bench: Bench) -> None:
    n = bench.shape.matmul
    a, b = torch.randn(2, n, n, device=bench.device, dtype=torch.bfloat16).unbind()
    seconds = bench.seconds(lambda: [a @ b for _ in range(10)]) / 10
    bench.matmul = 2 * n**3 / seconds / 1e12
    bench.add(row(f"bf16 product of {n} x {n} matrices", bench.matmul, None, "TFLOP/s"))


def model_rows(bench: Bench) -> None:
    """Build the model on the device; a CPU would need minutes to draw its weights."""
    s, layers = bench.shape, bench.shape.layers
    if bench.device.type == "cuda":
        room = 0.38 * torch.cuda.mem_get_info()[0]  # the rest: activations, moments, a plan
        layers = max(2, min(s.deepest, int(room // s.layer_bytes)))
    config = Qwen3MoeConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.hidden,
        intermediate_size=3 * s.hidden,
        moe_intermediate_size=s.intermediate,
        num_experts=s.experts,
        num_experts_per_tok=s.top_k,
        num_hidden_layers=layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.key_heads,
        head_dim=s.head_dim,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device=bench.device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(bench.device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(std=0.02)
    model.set_experts_implementation("grouped_mm")
    bench.model = MoEModel(model.eval().requires_grad_(False))
    bench.shape = replace(s, layers=layers, moment_layers=min(s.moment_layers, layers))
    bench.add(
        row("layers", layers, None, "count"),
        row("parameters", bench.model.parameters_total(), None, "count"),
        row("tokens of a forward", s.tokens, None, "count"),
    )


def forward_rows(bench: Bench) -> None:
    batch = bench.batch()
    ids, mask = (t.to(bench.device) for t in batch)
    plain = torch.no_grad()(partial(bench.model.hidden, ids, mask))
    with bench.peak("plain forward: peak memory beyond the weights"):
        plain()
    bench.plain = bench.seconds(plain)
    reached = bench.shape.flops(bench.shape.layers) / bench.plain / 1e12
    bench.add(
        row("plain forward of the body", bench.shape.tokens / bench.plain, None, "tokens/s"),
        row("plain forward of the body: reached", reached, None, "TFLOP/s"),
        row("plain forward of the body: reached / the product's", reached / bench.matmul),
    )


def statistics_rows(bench: Bench) -> None:
    batch, asked = bench.batch(), MomentScore().requires
    with bench.peak("REAP statistics: peak memory beyond the weights"):
        collect(bench.model, [batch], asked)
    seconds = bench.seconds(partial(collect, bench.model, [batch], asked))
    bench.add(
        row("REAP statistics", bench.shape.tokens / seconds, None, "tokens/s"),
        row("REAP statistics / plain forward", seconds / bench.plain, 1.2),
    )


def moment_rows(bench: Bench) -> None:
    """On the first layers only: a forward ends after the last that is measured."""
    layers = [la.index for la in bench.model.layers[: bench.shape.moment_layers]]
    batch = bench.batch()
    texts = [batch] * 4  # tensors of gigabytes are laid out and copied once a pass
    asked = (*MomentScore().requires, InputMoment(), MiddleMoment())
    plain = bench.seconds(partial(collect, bench.model, texts, [Count()], layers=layers), 2)
    name = f"statistics with moments of {len(layers)} layers"
    with bench.peak(f"{name}: peak memory beyond the weights"):
        one = bench.seconds(partial(collect, bench.model, [batch], asked, layers=layers), 1)
    many = bench.seconds(partial(collect, bench.model, texts, asked, layers=layers), 1)
    added = (many - one) / 3
    bench.add(
        row(f"{name}, 4 batches / forwards of these layers", many / plain),
        row(f"{name}, one more batch / a forward of these layers", added / (plain / 4)),
        row(f"{name}, to lay out and bring back", max(0.0, one - added), None, "s"),
    )


def student_rows(bench: Bench) -> None:
    reap = MomentScore()
    filled = collect(bench.model, [bench.batch()], reap.requires)
    plan = make_plan(reap, bench.model.layers, filled, Ratio(0.5), Uniform())
    with bench.peak("REAP student: memory beyond the teacher"):
        bench.student = apply_plan(bench.model, plan)


def kl_rows(bench: Bench) -> None:
    s = bench.shape
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = (s.tokens, s.hidden)
    states = [
        torch.randn(shape, generator=generator, device=bench.device, dtype=torch.bfloat16)
        for _ in range(2)
    ]
    weights = torch.full((s.tokens,), 1 / s.tokens, device=bench.device)

    def work(chunk: int) -> None:
        student = states[0].detach().requires_grad_()
        chunked_kl(student, states[1], weights, bench.model.head, chunk=chunk).backward()

    usual = default_chunk(bench.device)
    for chunk in (usual // 2, 2 * usual, usual):
        limit = 1.0 if chunk == usual else None
        with bench.peak(f"chunked KL, {chunk} tokens at a time: peak memory", limit):
            work(chunk)
        bench.kl = seconds = bench.seconds(partial(work, chunk))
        name = f"chunked KL and its gradient, {chunk} tokens at a time"
        bench.add(row(name, s.tokens / seconds, None, "tokens/s"))


class Steps(lightning.Callback):
    """Takes the time of every optimiser step of a fit, from the end of the one before."""

    def __init__(self, bench: Bench):
        self.bench, self.ends = bench, list[float]()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.bench.wait()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """The median, without the first two steps."""
        between = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(between[1:])


def router_kd_rows(bench: Bench, kind: str) -> None:
    """The repair as a run makes it: one batch is one optimiser step."""
    s = bench.shape
    held_out = s.blocks
    ids, mask = bench.batch(1, s.steps * s.blocks + held_out)
    text = TokenBlocks(ids, mask, "random")
    settings = RouterKD(
        batch_size=s.blocks, accumulate=1, evaluations=1, validation=held_out / len(ids)
    )
    teacher: Teacher = LiveTeacher(bench.model)
    if kind == "cached":
        began = time.perf_counter()
        teacher = CachedTeacher(final_hidden_states(bench.model, list(text.batches(s.blocks))))
        spoken = ids.numel() / (time.perf_counter() - began)
        bench.add(row("teacher's states, cached once", spoken, None, "tokens/s"))
    steps = Steps(bench)
    accelerator = "gpu" if bench.device.type == "cuda" else "cpu"
    trainer = {
        "accelerator": accelerator, "devices": 1, "enable_progress_bar": False,
        "callbacks": [steps],
    }  # fmt: skip
    name = f"Router KD, {kind} teacher"
    with bench.peak(f"{name}: peak memory beyond the weights"):
        done = repair(bench.student, teacher, text, settings, trainer, seed=0)
    if done.steps != s.steps:
        raise RuntimeError(f"the fit made {done.steps} steps and not {s.steps}")
    speed = s.tokens / steps.seconds
    head = min(bench.kl, steps.seconds)  # there once, however many layers
    scaled = s.tokens / ((steps.seconds - head) * s.deepest / s.layers + head)
    goal = 12_000 if kind == "cached" else None
    bench.add(
        row(name, speed, None, "tokens/s"),
        row(f"{name}: step / plain forward of the body", steps.seconds / bench.plain),
        row(f"{name}, scaled to {s.deepest} layers", scaled, None, "tokens/s"),
        *([row(f"{name}: goal of {goal:,} tokens/s / scaled", goal / scaled, 1.0)] if goal else []),
    )


def planning_rows(bench: Bench, name: str) -> None:
    """Seconds of one layer; its statistics are not counted."""
    compressor = preset("compressor", name)
    layer = bench.model.layers[0]
    asked = compressor.requires
    texts = [bench.batch(i) for i in range(4)] if asked else []
    filled = collect(bench.model, texts, asked, layers=[layer.index])
    bench.wait()
    began = time.perf_counter()
    budget = BUDGETS[compressor.budget]
    with torch.no_grad():
        make_plan(compressor, [layer], filled, budget, Uniform())
    bench.wait()
    label = f"planning a layer, {name}"
    bench.add(row(label, time.perf_counter() - began, None, "s"))


def mobe_rows(bench: Bench) -> None:
    """One start and a few steps of one of its three fits, scaled to the whole."""
    method, layer = MoBE(), bench.model.layers[0]
    sizes = method.sizes(layer, numbers_kept(dense_numbers(layer), 0.5))
    bases, rank = sizes["bases"], sizes["rank"]
    stack = layer.stack().gate.detach().float()
    few = stack[: len(stack) // bases]
    began = time.perf_counter()
    start(few, 1, rank)
    bench.wait()
    begins = (time.perf_counter() - began) * bases * 3
    e, (p, d) = len(stack), stack.shape[1:]
    generator = torch.Generator(bench.device).manual_seed(0)
    free = [
        torch.randn(shape, generator=generator, device=bench.device) * 0.02
        for shape in ((e, p, rank), (e, bases), (bases, rank, d))
    ]

    def loss(a: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return basis_loss(a, w.softmax(-1), b, stack, method.activation)

    work = partial(best_by_adam, free, loss, bench.shape.adam_steps, method.learning_rate, 99)
    fits = bench.seconds(work, 1) * method.steps / bench.shape.adam_steps * 3
    scaled = f"scaled from 1 of {bases} starts and {bench.shape.adam_steps} of {method.steps} steps"
    bench.add(
        row(f"planning a layer, mobe: the start ({scaled})", begins, None, "s"),
        row(f"planning a layer, mobe: the fit ({scaled})", fits, None, "s"),
    )


MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "bf16 product": matmul_rows,
    "model": model_rows,
    "plain forward": forward_rows,
    "REAP statistics": statistics_rows,
    "REAP student": student_rows,
    "chunked KL": kl_rows,
    "Router KD, cached teacher": partial(router_kd_rows, kind="cached"),
    "Router KD, live teacher": partial(router_kd_rows, kind="live"),
    "statistics with moments": moment_rows,
    **{f"planning, {n}": partial(planning_rows, name=n) for n in ("hc_smoe", "svd", "gptq")},
    "planning, mobe": mobe_rows,
}


def measure(bench: Bench, tell: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Take every measurement that begins before the deadline; `tell` is called after each."""
    for name, work in MEASUREMENTS.items():
        began = time.time()
        if began > bench.deadline:
            bench.rows.append({"name": name, "error": "not begun: the time was up"})
            continue
        try:
            work(bench)
        except Exception as error:  # the rest must still be measured
            last = traceback.format_exc().strip().splitlines()[-6:]
            said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            bench.rows.append({"name": name, "error": "\n".join([said, *last])})
            print(f"{name}: {bench.rows[-1]['error']}", flush=True)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"  {name}: {time.time() - began:.1f} s", flush=True)
        tell()
    return bench.rows


def surroundings(device: torch.device, command: str, revision: str | None) -> dict[str, str]:
    return {
        "card": torch.cuda.get_device_name() if device.type == "cuda" else "none (CPU)",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "revision": revision or rows.revision() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lightning": lightning.__version__,
        "command": f"`{command}`",
    }


MARK = "## Measured\n"


def section(found: dict[str, Any]) -> str:
    """Return the generated section of the page."""
    lines = [MARK, *(f"* {name}: {value}" for name, value in found["surroundings"].items()), ""]
    lines += ["| measurement | value | unit | goal |", "|---|---:|---|---|"]
    for r in found["rows"]:
        if "error" in r:
            lines.append(f"| {r['name']} | failed | | {r['error'].splitlines()[0]} |")
            continue
        goal = ""
        if r["limit"] is not None:
            goal = f"at most {r['limit']:g}: {'reached' if r['value'] <= r['limit'] else 'missed'}"
        value = f"{r['value']:,.0f}" if r["value"] >= 1000 else f"{r['value']:.3g}"
        lines.append(f"| {r['name']} | {value} | {r['unit']} | {goal} |")
    return "\n".join(lines) + "\n"


def write_page(path: Path, found: dict[str, Any]) -> None:
    """Put the section in the place of the one that the page has."""
    before = path.read_text(encoding="utf-8").split(MARK)[0]
    path.write_text(before + section(found), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"))
    parser.add_argument("--page", type=Path, help="rewrite the measured section of this page")
    parser.add_argument("--minutes", type=float, default=5.5, help="no measurement begins later")
    parser.add_argument("--revision", help="of this code, where git cannot be asked")
    parser.add_argument("--small", action="store_true", help="a toy on a CPU")
    a = parser.parse_args()
    if not a.small and not torch.cuda.is_available():
        print("no GPU is there: nothing was measured (--small tries the script on a CPU)")
        return 2
    device = torch.device("cpu" if a.small else "cuda")
    bench = Bench(SMALL if a.small else Shape(), device, time.time() + 60 * a.minutes)
    around = surroundings(device, f"gpu.py --minutes {a.minutes:g}", a.revision)

    def write() -> None:
        found = {"surroundings": around, "rows": bench.rows}
        a.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if a.page:
            write_page(a.page, found)

    measure(bench, write)
    write()
    return 1 if any("error" in r for r in bench.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
