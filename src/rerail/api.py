"""The algorithm as functions, for notebooks, scripts, and the runner of cells.

    teacher = load("zoo:tiny_fine")
    calibration = text(teacher, samples=64)
    student = compress(teacher, "reap", 0.5, calibration)
    repaired = repair(student, teacher, calibration)
    print(evaluate(repaired.student, teacher, text(teacher, samples=64, split="heldout")))
    save(repaired.student, "smaller")

Names of presets are those of the command line (`reap`, `mix`, `router_kd`); objects of the classes
that the presets name are taken as well. The command line calls these functions with a `Recorder`
that keeps what they make.

Everywhere `teacher` is the original model, `batch_size` the blocks of one forward, and `recorder`
hears of what is made.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import rerail.auto  # noqa: F401  (package checkpoints load like any other)
from rerail.arguments import (
    Method,
    Text,
    as_allocation,
    as_blocks,
    as_budget,
    as_method,
    as_settings,
    blocks_for,
    check_statistics,
)
from rerail.compress.base import Compressor, Fitness, Remeasure, make_plan
from rerail.compress.sequential import sequential
from rerail.compress.templates.skipper import Skipper, check_fitted, without_policies
from rerail.config.presets import preset
from rerail.distill import repair as fitting
from rerail.distill.settings import Ridge, Settings
from rerail.errors import InputError
from rerail.evaluate.fitness import plan_fitness
from rerail.evaluate.scores import Scores, score_texts
from rerail.language_model import LanguageModel, Repaired
from rerail.moe.model import MoEModel
from rerail.moe.source import ModelSource
from rerail.parallel import broadcast_from_first, is_first, run_on_first
from rerail.plan.allocation import Allocation
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Bits, Budget, Ratio, Skip
from rerail.plan.plan import Plan
from rerail.plan.search import Search
from rerail.recorder import SILENT, Recorder
from rerail.statistics.collect import collect as collect_statistics
from rerail.statistics.statistic import Statistic, StatisticSet
from rerail.teacher.hidden_states import CachedTeacher, LiveTeacher, Teacher, final_hidden_states
from rerail.text.calibration import BATCH_SIZE, Calibration, TokenBlocks, check_vocabulary

log = logging.getLogger(__name__)

TRAINER = {"accelerator": "auto", "devices": 1, "enable_progress_bar": False}  # by default

__all__ = [
    "Bits",
    "LanguageModel",
    "Plan",
    "Ratio",
    "Recorder",
    "Repaired",
    "Scores",
    "Skip",
    "apply",
    "collect",
    "compress",
    "evaluate",
    "load",
    "plan",
    "preset",
    "repair",
    "save",
    "text",
]


def load(path_or_id: str | ModelSource, **options: Any) -> LanguageModel:
    """Load a frozen MoE model and its tokenizer.

    Args:
        path_or_id: a folder, a hub id, `zoo:tiny_fine`, or a source.
        options: further fields of `ModelSource`, such as dtype and device.

    Raises:
        InputError: it cannot be loaded, or is not supported.
    """
    source = path_or_id
    if not isinstance(source, ModelSource):
        source = ModelSource(source, **options)
    loaded = LanguageModel(source.load(), source.tokenizer(), source)
    check_vocabulary(loaded.tokenizer, loaded.model.vocab_size)
    return loaded


def text(
    teacher: LanguageModel | Any,
    calibration: str | Calibration | Sequence[str] = "mix",
    *,
    recorder: Recorder = SILENT,
    **fields: Any,
) -> TokenBlocks:
    """Return blocks of text, e.g. `text(teacher, samples=64, split="heldout")`.

    Args:
        teacher: the model, or its tokenizer where the text is not written by the model itself.
        calibration: a preset, a `Calibration`, or strings; each string becomes one block.
        fields: of the preset; for strings `block`, the tokens after which they are cut.

    Raises:
        InputError: there is no such preset, or it gives too little text.
    """
    model, tokenizer = None, cast(Any, teacher)
    if isinstance(teacher, LanguageModel):
        model, tokenizer = teacher.model.model, teacher.tokenizer
    if isinstance(calibration, str):
        calibration = cast(Calibration, preset("calibration", calibration, **fields))
    if isinstance(calibration, Calibration):
        make = partial(calibration.blocks, tokenizer, model)
        return recorder.text(calibration, tokenizer, make)
    return as_blocks(tokenizer, calibration, **fields)


def collect(
    teacher: LanguageModel,
    text: Text,
    *what: Method | Statistic,
    batch_size: int = BATCH_SIZE,
    recorder: Recorder = SILENT,
) -> StatisticSet:
    """Collect, in one pass, the statistics that all the methods need.

    Args:
        text: calibration text.
        what: methods, or statistics themselves.
    """
    wanted: list[Statistic] = []
    for item in what:
        wanted += [item] if isinstance(item, Statistic) else as_method(item).requires
    blocks = blocks_for(teacher, text)
    batches = list(blocks.batches(batch_size))

    def make(missing: Sequence[Statistic]) -> StatisticSet:
        return collect_statistics(teacher.model, batches, missing, recorder.progress("statistics"))

    # two methods may ask for the same statistic: equal settings make it equal
    return recorder.statistics(teacher, blocks, tuple(dict.fromkeys(wanted)), make)


def plan(  # noqa: PLR0913
    teacher: LanguageModel,
    method: Method,
    budget: Budget | float | None,
    text: Text | None = None,
    *,
    statistics: StatisticSet | None = None,
    allocation: Allocation | str | None = None,
    batch_size: int = BATCH_SIZE,
    recorder: Recorder = SILENT,
) -> Plan:
    """Decide what becomes of every layer; no weight moves.

    A sequential method (camera, naee_progressive) measures each scope on the student of the plan so
    far, so it needs the text whatever statistics there are.

    Args:
        method: a preset or a compressor.
        budget: `Ratio(0.5)`, `Bits(4)`, `Skip(0.25)`, or the number alone: the method says what it
            counts. None is a skipper's own rule.
        text: calibration text.
        statistics: what `collect` returned, instead of the text.
        allocation: how layers share the budget; evenly by default.

    Raises:
        InputError: the budget is of another kind or out of reach, or the method must measure
            something and there is no text.
    """
    compressor = as_method(method)
    asked, shares = as_budget(budget, compressor), as_allocation(allocation)

    def make() -> Plan | None:
        made = _plan(teacher, compressor, asked, shares, text, statistics, batch_size, recorder)
        if made is not None and is_first():
            for note in made.lineage.get("notes", ()):
                log.warning("%s", note)
        return made

    return recorder.plan(make)


def apply(
    teacher: LanguageModel,
    plan: Plan,
    method: Method | None = None,
    budget: Budget | float | None = None,
) -> LanguageModel:
    """Return the student; it shares every Parameter that does not change with the teacher.

    Args:
        plan: of its layers.
        method, budget: what made the plan; a skipper's policies are fitted anew by them once the
            student is repaired.

    Raises:
        InputError: the plan does not fit the model.
    """
    made = None if method is None else as_method(method)
    asked = None if made is None else as_budget(budget, made)
    student = apply_plan(teacher.model, plan)
    return dataclasses.replace(teacher, model=student, plan=plan, method=made, budget=asked)


def compress(
    teacher: LanguageModel,
    method: Method,
    budget: Budget | float | None,
    text: Text | None = None,
    **options: Any,
) -> LanguageModel:
    """Plan and apply.

    Args:
        teacher, method, budget, text: as for `plan`.
        options: further arguments of `plan`: statistics, allocation, batch_size, recorder.

    Raises:
        InputError: as `plan`.
    """
    made = as_method(method)  # once, so that plan and student name the same object
    return apply(teacher, plan(teacher, made, budget, text, **options), made, budget)


def repair(  # noqa: PLR0913
    student: LanguageModel,
    teacher: LanguageModel,
    text: Text,
    distill: str | Settings = "router_kd",
    *,
    trainer: Mapping[str, Any] | None = None,
    seed: int = 0,
    teacher_batch_size: int = BATCH_SIZE,
    recorder: Recorder = SILENT,
    **fields: Any,
) -> Repaired:
    """Fit router rows by Router KD (the best step is kept), and a skipper's policies after it.

    With distill="ridge" they are solved for instead, see `rerail.distill.ridge`.

    Args:
        student: the compressed model; it is left as it is.
        text: calibration text; its last share validates.
        distill: a preset, or settings.
        trainer: further arguments of lightning.Trainer.
        seed: of the order of the blocks.
        teacher_batch_size: blocks a forward of the teacher, and of what policies are fitted on.
        fields: of the preset, as in `epochs=1, batch_size=4`.

    Raises:
        InputError: too little text, gate weights without gradient, or a KL that is not finite.
    """
    settings = as_settings(distill, **fields)
    blocks = blocks_for(teacher, text)

    def make() -> fitting.Repair:
        return fitting.repair(
            student.model.with_shared_parameters(),  # it trains in place
            _teacher_of(settings, teacher, blocks, teacher_batch_size, recorder),
            blocks,
            settings,
            TRAINER if trainer is None else trainer,
            seed,
            recorder.folder,
            recorder.point,
        )

    fit = recorder.fit(make)
    # the rows go into a student of its own, also where the fit comes from an earlier run
    model = student.model.with_shared_parameters()
    fitting.set_router_rows(model, fit.after)
    repaired = dataclasses.replace(student, model=model)
    return _with_policies(repaired, fit, blocks, teacher_batch_size, recorder)


def evaluate(  # noqa: PLR0913
    student: LanguageModel,
    teacher: LanguageModel,
    texts: Text | Mapping[str, TokenBlocks],
    *,
    reference: Scores | None = None,
    stage: str = "student",
    batch_size: int = BATCH_SIZE,
    recorder: Recorder = SILENT,
) -> Scores:
    """Return NLL and KL from the teacher, agreement, and how routing moved, on held-out text.

    Args:
        student: what is scored; `evaluate(teacher, teacher, texts)` scores the teacher.
        texts: one text, or several by name.
        reference: the teacher's scores of the same texts; they are made where they are missing.
        stage: what the student is called for the recorder: `compressed` or `repaired`.
    """
    asked = texts if isinstance(texts, Mapping) else {"text": texts}
    named = {name: blocks_for(teacher, text) for name, text in asked.items()}

    def scored(model: LanguageModel, name: str, against: Scores | None) -> Scores:
        def make() -> Scores:
            return score_texts(
                model.model,
                named,
                against,
                model.plan,
                batch_size,
                progress=lambda text: recorder.progress(f"{name} on {text}"),
            )

        return recorder.scores(name, model, named, make)

    reference = reference or scored(teacher, "teacher", None)
    return reference if student.model is teacher.model else scored(student, stage, reference)


def save(
    student: LanguageModel,
    path: str | Path,
    form: str = "native",
    densify: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint in the dtype of the teacher's.

    Args:
        student: repaired or not.
        path: a new or empty folder, or an earlier export, which is replaced.
        form: `native` (stock transformers), `package` (after `import rerail.auto`) or `remote`.
        densify: turn every stored form into plain experts first.
        facts: further entries of its `compression.json`.

    Raises:
        InputError: the form cannot hold the student.
    """
    from rerail.export.targets import export_student  # only those who save wait for this import

    source = student.source
    parent = {"model": source.path_or_id, "fingerprint": source.fingerprint()}
    return export_student(
        student.model,
        student.plan or Plan(),
        Path(path),
        form=form,
        tokenizer=student.tokenizer,
        manifest={"parent": parent, **(facts or {})},
        densify=densify,
        dtype=source.stored_dtype(),
        companions=source.companions(),
    )


def _plan(  # noqa: PLR0913
    teacher: LanguageModel,
    method: Compressor,
    budget: Budget,
    allocation: Allocation,
    text: Text | None,
    statistics: StatisticSet | None,
    batch_size: int,
    recorder: Recorder,
) -> Plan | None:
    """Measure what is wanted, and plan; in a group the first process at least returns the plan."""
    layers, measured = teacher.model.layers, StatisticSet()
    remeasure, fitness = None, None
    if budget.removed != 0:
        method.check(layers, budget, allocation)  # before anything is measured
        measured, remeasure = _measure(teacher, method, text, statistics, batch_size, recorder)
        how = method.judged_by
        if isinstance(allocation, Search):
            how = allocation.measure, allocation.blocks
        if how is not None:
            fitness = _fitness(teacher, method, how, text, batch_size, recorder)
            known = measured
            measured = broadcast_from_first(lambda: known)  # all must ask for the same plans
    decide = partial(make_plan, method, layers, measured, budget, allocation, remeasure)
    decide = partial(decide, fitness=fitness)
    # in a group all processes measure and judge together; a plan alone is the first one's task
    return decide() if remeasure or fitness else run_on_first(decide)


def _measure(
    teacher: LanguageModel,
    method: Compressor,
    text: Text | None,
    statistics: StatisticSet | None,
    batch_size: int,
    recorder: Recorder,
) -> tuple[StatisticSet, Remeasure | None]:
    """Return what a method plans from: the teacher's statistics, or what measures each scope."""
    indices = [layer.index for layer in teacher.model.layers]
    if method.driver != "sequential" and statistics is not None:
        check_statistics(statistics, method, indices)
        return statistics, None
    if method.driver != "sequential" and not method.requires:
        return StatisticSet(), None
    if text is None:
        raise InputError(
            f"{type(method).__name__} measures the model on calibration text and there is none; "
            "give text, e.g. api.text(teacher), or statistics where the method is not sequential"
        )
    blocks = blocks_for(teacher, text)
    if method.driver == "sequential":
        batches = list(blocks.batches(batch_size))
        return StatisticSet(), sequential(
            teacher.model, batches, method.requires, recorder.progress
        )
    return collect(teacher, blocks, method, batch_size=batch_size, recorder=recorder), None


def _fitness(
    teacher: LanguageModel,
    method: Compressor,
    how: tuple[str, int],
    text: Text | None,
    batch_size: int,
    recorder: Recorder,
) -> Fitness:
    """Return what judges the plans of a search on calibration text, by measure and blocks.

    Raises:
        InputError: there is no text.
    """
    if text is None:
        raise InputError(
            "a search judges students on calibration text and there is none; give text, e.g. "
            "api.text(teacher)"
        )
    measure, count = how
    blocks = blocks_for(teacher, text).first(count)
    bar = recorder.progress("a plan of the search")
    fitness = plan_fitness(teacher.model, blocks, measure, batch_size, bar)
    known = (measure, repr(method), batch_size)

    def judge(plan: Plan) -> float:
        what = (*known, plan.fingerprint())
        return recorder.fitness(teacher, blocks, what, lambda: fitness(plan))

    return judge


def _teacher_of(
    settings: Settings,
    teacher: LanguageModel,
    blocks: TokenBlocks,
    batch_size: int,
    recorder: Recorder,
) -> Teacher:
    """Return what a fit learns from: the live model, or its final hidden states on the text."""
    if isinstance(settings, Ridge) or settings.teacher == "live":
        return LiveTeacher(teacher.model)
    batches = list(blocks.batches(batch_size))
    bar = recorder.progress("teacher")
    states = partial(final_hidden_states, teacher.model, batches, bar)
    return CachedTeacher(recorder.states(teacher, blocks, states))


def _with_policies(
    student: LanguageModel,
    fit: fitting.Repair,
    blocks: TokenBlocks,
    batch_size: int,
    recorder: Recorder,
) -> Repaired:
    """Fit a skipper's policies anew on the router as it now is; other students need nothing.

    Raises:
        InputError: the student has policies and does not say which method and budget made them.
    """
    method, budget = student.method, student.budget
    if not isinstance(method, Skipper) or not isinstance(budget, Skip) or budget.removed == 0:
        check_fitted(student.model)
        return Repaired(student, fit)
    batches = list(blocks.batches(batch_size))

    def measure(model: MoEModel) -> StatisticSet:
        return collect_statistics(model, batches, method.requires, recorder.progress("gate ratios"))

    # thresholds were fitted on gate weights of the router before it was repaired
    policies = recorder.policies(lambda: method.refit(student.model, measure, budget))
    model = apply_plan(without_policies(student.model), policies)
    check_fitted(model)
    return Repaired(dataclasses.replace(student, model=model), fit, policies)
