"""The Python door: the steps of a run as functions, for notebooks and scripts.

Names of presets are those of the command line (`reap`, `mix`, `router_kd`); objects of the classes
that the presets name are taken as well.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import rerail.auto  # noqa: F401  (package checkpoints load like any other)
from rerail.compress.base import Compressor, make_plan
from rerail.config.presets import preset
from rerail.distill import repair as fit
from rerail.evaluate.estimates import mean_and_se
from rerail.evaluate.perplexity import score_blocks
from rerail.moe.model import MoEModel
from rerail.moe.source import ModelSource
from rerail.plan.allocation import Allocation, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.plan.sizes import Sizes
from rerail.statistics.collect import collect as collect_statistics
from rerail.statistics.statistic import StatisticSet
from rerail.teacher.hidden_states import CachedTeacher, final_hidden_states
from rerail.text.calibration import Calibration, TokenBlocks, check_vocabulary

__all__ = ["Loaded", "collect", "compress", "evaluate", "load", "preset", "repair", "save", "text"]

BATCH = 16


class Loaded(NamedTuple):
    """A model with its tokenizer and, for a student, the plan that made it."""

    model: MoEModel
    tokenizer: Any
    source: ModelSource
    plan: Plan | None = None


def load(path_or_id: str, **options: Any) -> Loaded:
    """Load a frozen MoE model and its tokenizer: a folder, a hub id, or `zoo:tiny_fine`."""
    source = ModelSource(path_or_id, **options)
    loaded = Loaded(source.load(), source.tokenizer(), source)
    check_vocabulary(loaded.tokenizer, loaded.model.vocab_size)
    return loaded


def text(teacher: Loaded, calibration: str | Calibration = "mix", **fields: Any) -> TokenBlocks:
    """Return blocks of calibration text, e.g. `text(teacher, samples=64, split="heldout")`."""
    made = calibration
    if isinstance(made, str):
        made = cast(Calibration, preset("calibration", made, **fields))
    return made.blocks(teacher.tokenizer, teacher.model.model if made.needs_model else None)


def _compressor(method: str | Compressor) -> Compressor:
    made = preset("compressor", method) if isinstance(method, str) else method
    assert isinstance(made, Compressor)
    return made


def collect(teacher: Loaded, blocks: TokenBlocks, *methods: str | Compressor) -> StatisticSet:
    """Collect, in one pass, the statistics that all the methods need."""
    wanted = [s for method in methods for s in _compressor(method).requires]
    return collect_statistics(teacher.model, list(blocks.batches(BATCH)), wanted)


def compress(
    teacher: Loaded,
    method: str | Compressor,
    ratio: float,
    statistics: StatisticSet | None = None,
    allocation: Allocation | None = None,
) -> Loaded:
    """Plan and apply; the student shares every Parameter that does not change with the teacher."""
    plan = make_plan(
        _compressor(method),
        teacher.model.layers,
        statistics or StatisticSet(),
        Ratio(ratio),
        allocation or Uniform(),
    )
    return teacher._replace(model=apply_plan(teacher.model, plan), plan=plan)


def repair(
    student: Loaded, teacher: Loaded, blocks: TokenBlocks, distill: str = "router_kd", **fields: Any
) -> fit.Repair:
    """Fit the student's router rows in place by Router KD; the best step is kept."""
    settings = preset("distill", distill, **fields)
    states = CachedTeacher(final_hidden_states(teacher.model, list(blocks.batches(BATCH))))
    quiet = {"accelerator": "auto", "devices": 1, "enable_progress_bar": False}
    return fit.repair(student.model, states, blocks, settings, quiet, seed=0)


def evaluate(student: Loaded, teacher: Loaded, blocks: TokenBlocks) -> Mapping[str, Any]:
    """Return NLL and KL a token (nats) with standard errors, agreement, and sizes in bytes."""
    batches = list(blocks.batches(BATCH))
    spoken = score_blocks(teacher.model, batches)
    scores = score_blocks(student.model, batches, spoken.hidden)
    nll, nll_se = mean_and_se(scores.nll, scores.tokens)
    kl, kl_se = mean_and_se(scores.kl, scores.tokens)
    sizes = Sizes.of(student.model, teacher.source.itemsize())
    return {
        "nll": nll,
        "nll_se": nll_se,
        "kl": kl,
        "kl_se": kl_se,
        "agreement": mean_and_se(scores.agree, scores.tokens)[0],
        "tokens": int(scores.tokens.sum()),
        "bytes": sizes.bytes,
    }


def save(student: Loaded, path: str | Path, form: str = "native", densify: bool = False) -> Path:
    """Write a checkpoint: `native` (stock transformers), `package` or `remote`.

    Raises:
        InputError: the form cannot hold the student.
    """
    from rerail.export.targets import export_student

    return export_student(
        student.model,
        student.plan or Plan(),
        Path(path),
        form=form,
        tokenizer=student.tokenizer,
        manifest={"parent": student.source.fingerprint()},
        densify=densify,
        dtype=student.source.stored_dtype(),
    )
