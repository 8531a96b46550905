"""The stages of one cell, one function each; every one is re-entrant."""

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rerail.compress.base import make_plan
from rerail.compress.sequential import sequential
from rerail.compress.templates.skipper import Skipper, check_fitted, without_policies
from rerail.distill.curve import CurveReporter
from rerail.distill.repair import set_router_rows, repair
from rerail.evaluate.perplexity import BlockScores, score_blocks
from rerail.evaluate.routing import Routing, routing_changed, load_by_expert
from rerail.files import cache_dir
from rerail.moe.model import MoEModel
from rerail.parallel import run_on_first, read_or_make
from rerail.plan.apply import apply_plan
from rerail.plan.plan import Plan
from rerail.run.cell import Cell
from rerail.run.cost import peak_memory, start_peak, with_cost
from rerail.run.progress import Steps, bar
from rerail.statistics.cached import cached_statistics
from rerail.statistics.collect import collect
from rerail.statistics.statistic import Statistic, StatisticSet
from rerail.store import Artefact, get, read, write
from rerail.teacher.hidden_states import CachedTeacher, LiveTeacher, Teacher, final_hidden_states
from rerail.text.calibration import TokenBlocks

log = logging.getLogger(__name__)


def statistics(
    cell: Cell, model: MoEModel, blocks: TokenBlocks, wanted: Sequence[Statistic]
) -> StatisticSet:
    """Return the statistics, collecting in one pass those that the store lacks.

    In a group of processes all collect, and the first one has them all.
    """
    key = cell.key_of(model, blocks.fingerprint)
    batches = list(blocks.batches(cell.evaluation.batch_size))

    def measure(missing: Sequence[Statistic]) -> StatisticSet:
        return collect(model, batches, missing, bar("statistics"))

    return cached_statistics(cache_dir() / "statistics" / key, wanted, measure)


def plan(
    cell: Cell, model: MoEModel, blocks: TokenBlocks, folder: Path
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan, read or made, and what making it cost (statistics included)."""
    path, beside = folder / "plan.json", folder / "plan.cost.json"

    def stored() -> tuple[Plan, dict[str, Any]] | None:
        plan, cost = Plan.load(path), read(beside)
        if plan is None or cost is None:
            return None
        plan.validate(model.layers)
        return plan, cost.data

    def make() -> tuple[Plan | None, dict[str, Any]]:
        start_peak()
        start = time.perf_counter()
        made = _made_plan(cell, model, blocks)
        return made, {"seconds": time.perf_counter() - start, "peak_memory": peak_memory()}

    def put(made: tuple[Plan | None, dict[str, Any]]) -> tuple[Plan, dict[str, Any]]:
        plan, cost = made
        assert plan is not None  # on the first process
        plan.save(path)
        for note in plan.lineage.get("notes", ()):
            log.warning("%s", note)
        write(beside, Artefact(cost))
        return plan, cost

    return read_or_make(stored, make, put)


def _made_plan(cell: Cell, model: MoEModel, blocks: TokenBlocks) -> Plan | None:
    """Return the plan on the first process; where it measures between its steps, on all."""
    decide = functools.partial(make_plan, cell.compressor, model.layers)
    choices = cell.budget, cell.allocation
    if cell.budget.removed == 0:
        return decide(StatisticSet(), *choices, None)
    cell.compressor.check(model.layers, *choices)
    if cell.compressor.driver == "sequential":
        batches = list(blocks.batches(cell.evaluation.batch_size))
        remeasure = sequential(model, batches, cell.compressor.requires, bar)
        return decide(StatisticSet(), *choices, remeasure)
    filled = statistics(cell, model, blocks, cell.compressor.requires)
    return run_on_first(lambda: decide(filled, *choices, None))


def teacher_states(cell: Cell, model: MoEModel, blocks: TokenBlocks) -> Teacher:
    """Return the teacher of a text: cached final hidden states, or the live model."""
    if cell.distill.teacher == "live":
        return LiveTeacher(model)
    key = cell.key_of(model, blocks.fingerprint)
    batches = list(blocks.batches(cell.evaluation.batch_size))

    def make() -> Artefact:
        return Artefact({}, {"hidden": final_hidden_states(model, batches, bar("teacher"))})

    path = cache_dir() / "teacher" / f"{key}.json"
    return CachedTeacher(get(path, make, [final_hidden_states]).tensors["hidden"])


def score_teacher(cell: Cell, model: MoEModel, texts: dict[str, TokenBlocks]) -> Artefact:
    """Score the teacher on all held-out texts, once for every cell of the same model and texts."""
    prints = {name: t.fingerprint for name, t in texts.items()}
    key = cell.key_of(model, prints)

    def make() -> Artefact:
        data: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, text in texts.items():
            scores = _score(cell, model, text, None, f"teacher on {name}")
            assert scores.hidden is not None
            layers = [
                _load(scores.routing, i, {}, scores.routing.num_slots[i])
                for i in scores.routing.num_slots
            ]
            data[name] = {**_sums(scores), "layers": layers}
            tensors[f"{name}.hidden"] = scores.hidden
            tensors |= {
                f"{name}.chosen.{i}": scores.routing.slots(i) for i in scores.routing.chosen
            }
        return Artefact(data, tensors)

    path = cache_dir() / "scores" / f"{key}.json"
    return get(path, with_cost(make), [score_blocks, _load, _sums])


def score_student(
    cell: Cell,
    student: MoEModel,
    texts: dict[str, TokenBlocks],
    teacher: Artefact,
    plan: Plan,
    path: Path,
) -> Artefact:
    """Score a student on the same texts, with KL, agreement and moved routing."""
    shorter = ("slice", "pooled")
    kept = {part.layer: part.kept for part in plan.layers if part.router in shorter}

    def make() -> Artefact:
        data: dict[str, Any] = {}
        for name, text in texts.items():
            label = f"{path.stem} on {name}"
            scores = _score(cell, student, text, teacher[1][f"{name}.hidden"], label)
            before = Routing(
                {i: [teacher[1][f"{name}.chosen.{i}"]] for i in scores.routing.chosen},
                dict(scores.routing.num_slots),
            )
            moved = routing_changed(before, scores.routing, kept)
            experts = {one["layer"]: len(one["load"]) for one in teacher[0][name]["layers"]}
            layers = [
                {"routing_changed": moved[i], **_load(scores.routing, i, kept, experts[i])}
                for i in moved
            ]
            data[name] = {**_sums(scores), "layers": layers}
        return Artefact(data)

    return get(path, with_cost(make))


def _load(
    routing: Routing, layer: int, kept: Mapping[int, tuple[int, ...]], experts: int
) -> dict[str, Any]:
    """Return how evenly a layer's experts are loaded, and each one's share."""
    load = load_by_expert(routing, layer, kept, experts)
    return {"layer": layer, "load_entropy": routing.load_entropy(layer), "load": load}


def _score(
    cell: Cell, model: MoEModel, text: TokenBlocks, teacher: Tensor | None, label: str
) -> BlockScores:
    batches = list(text.batches(cell.evaluation.batch_size))
    return score_blocks(model, batches, teacher, bar(label))


def _sums(scores: BlockScores) -> dict[str, Any]:
    named = {"nll": scores.nll, "tokens": scores.tokens, "kl": scores.kl, "agree": scores.agree}
    return {name: tensor.tolist() for name, tensor in named.items()} | {"active": scores.active}


def repair_student(
    cell: Cell,
    model: MoEModel,
    student: MoEModel,
    blocks: TokenBlocks,
    folder: Path,
    tell: Callable[[Mapping[str, float]], None],
) -> Artefact:
    """Train the router, or put an earlier fit's rows back; rows before and after are kept.

    Each point of a fit is told to `tell` as it comes.
    """

    def make() -> Artefact:
        teacher = teacher_states(cell, model, blocks)
        steps = Schedule.of(len(blocks), cell.distill, group_rank_and_size()[1]).steps

        def report(point: Mapping[str, float]) -> None:
            tell(point)
            if "batch_kl" in point:
                progress.tell("step", int(point["step"]), steps)

        done = repair(
            student, teacher, blocks, cell.distill, cell.trainer, cell.seed, folder, report
        )
        data = {
            n: getattr(done, n)
            for n in ("kl_first", "kl_best", "kl_last", "best_step", "steps", "curve")
        }
        tensors = {f"before.{n}": t for n, t in done.before.items()}
        return Artefact(data, tensors | {f"after.{n}": t for n, t in done.after.items()})

    data, tensors = get(folder / "repair.json", with_cost(make))
    after = {n.removeprefix("after."): t for n, t in tensors.items() if n.startswith("after.")}
    set_router_rows(student, after)
    return Artefact(data, tensors)


def refit(cell: Cell, student: MoEModel, blocks: TokenBlocks, folder: Path) -> MoEModel:
    """Return the student, its policies fitted on the router as it now is."""
    compressor = cell.compressor
    if not isinstance(compressor, Skipper) or cell.skip.share == 0:
        return student
    path = folder / "policy.json"
    batches = list(blocks.batches(cell.evaluation.batch_size))

    def measure(model: MoEModel) -> StatisticSet:
        return collect(model, batches, compressor.requires, bar("gate ratios"))

    def write(plan: Plan) -> Plan:
        plan.save(path)
        return plan

    plan = read_or_make(
        lambda: Plan.load(path), lambda: compressor.refit(student, measure, cell.skip), write
    )
    fitted = apply_plan(without_policies(student), plan)
    check_fitted(fitted)
    return fitted


def seen(cell: Cell, stage: str, model: MoEModel, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Return what is looked at rather than counted: `text` (the continuation) and lm-eval `tasks`.

    The teacher is asked once for every cell of the same model.
    """
    tasks, new_tokens = cell.evaluation.tasks, cell.evaluation.new_tokens
    path = folder / f"{stage}.seen.json"
    if stage == "teacher":
        key = cell.key_of(model, cell.prompt, cell.seed, new_tokens, tasks and tasks.fingerprint())
        path = cache_dir() / "scores" / f"{key}.seen.json"

    def make() -> Artefact:
        scored = None if tasks is None else tasks.evaluate(model.model, tokenizer)
        return Artefact({"text": continuation(cell, model, tokenizer), "tasks": scored})

    found: dict[str, Any] = get(path, with_cost(lambda: run_on_first(make))).data
    return found


@torch.no_grad()
def continuation(cell: Cell, model: MoEModel, tokenizer: Any) -> str:
    """Return what the model writes after the cell's prompt, sampled with a fixed seed."""
    if not cell.evaluation.new_tokens or not cell.prompt:
        return ""
    device = next(model.model.parameters()).device
    inputs = tokenizer(cell.prompt, return_tensors="pt", add_special_tokens=False).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(cell.seed)
        out = cast(Any, model.model).generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=True,
            temperature=0.8,
            top_k=40,
            max_new_tokens=cell.evaluation.new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text
