"""Benchmark tasks by lm-eval, in process, on any causal language model of transformers."""

import contextlib
import copy
import functools
import importlib.metadata
import io
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rerail.errors import InputError
from rerail.evaluate.local_tasks import (
    check_known,
    check_local,
    local_config,
    local_fingerprint,
)

log = logging.getLogger(__name__)

BOOTSTRAPS = 200  # only metrics without a closed form (perplexity) are resampled


class TaskScore(TypedDict):
    """One metric of one task, as it is stored in a result row.

    Attributes:
        task, metric: names, as lm-eval's.
        value: in the metric's own unit.
        se: standard error of the value; None where lm-eval knows none.
        n: number of documents.
    """

    task: str
    metric: str
    value: float
    se: float | None
    n: int


@dataclass(frozen=True)
class Harness:
    """Which tasks to score, and how.

    Attributes:
        tasks: names beginning with `local_` read `$RERAIL_DATA/eval`; any other name is one of
            lm-eval's own tasks, whose documents come from the Hugging Face hub.
        limit: at most this many documents a task, evenly spaced, because files such as BLiMP's are
            sorted by subtask; None scores all.
        batch_size: sequences in one forward.
        num_fewshot: solved examples before each question; None keeps each task's own number.
        max_length: longest sequence in tokens; None takes the model's own limit.
        include_defaults: index lm-eval's own tasks (seconds) even if only local ones are named.
    """

    tasks: Sequence[str] = ()
    limit: int | None = None
    batch_size: int = 16
    num_fewshot: int | None = None
    max_length: int | None = None
    include_defaults: bool = False

    def __post_init__(self) -> None:
        """Accept a single name or any sequence of names (Hydra hands over its own list type)."""
        names = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)
        object.__setattr__(self, "tasks", names)

    def check(self) -> None:
        """Find bad settings, unknown tasks and missing data before any model is loaded.

        Raises:
            InputError: a number out of range, an unknown task, `RERAIL_DATA` unset, a data file
                that is missing or unreadable, or a hub task whose data cannot be fetched.
        """
        self._check_without_network()
        if any(not name.startswith("local_") for name in self.tasks):
            self._load()

    def fingerprint(self) -> dict[str, Any]:
        """Return all that decides the scores of a model: settings, version of lm-eval, local files.

        What the hub holds is taken to stay as it is.
        """
        settings = {n: v for n, v in asdict(self).items() if n != "include_defaults"}
        local = {n: local_fingerprint(n) for n in self.tasks if n.startswith("local_")}
        return {**settings, "lm_eval": importlib.metadata.version("lm_eval"), "local": local}

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list[TaskScore]:
        """Return one score a task and metric.

        The model is left as it was (training mode, gradients, device).

        Raises:
            InputError: as `check`.
        """
        if not self.tasks:
            return []
        self._check_without_network()
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        loaded = self._load()
        for task in loaded["tasks"].values():
            self._set_shots(task)
        with _training_modes_restored(model), _quiet():
            lm = HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # HFLM may set its padding token
                batch_size=self.batch_size,
                max_length=self.max_length,
            )
            outcome = evaluate(
                lm,
                loaded,
                samples=self._positions(loaded["tasks"]),
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        return task_scores(outcome["results"])

    def _check_without_network(self) -> None:
        lowest = {"limit": 1, "batch_size": 1, "num_fewshot": 0, "max_length": 2}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{name}={value} is too small for the harness; use {low} or more")
        for name in self.tasks:
            if name.startswith("local_"):
                check_local(name)

    def _load(self) -> Any:
        """Build lm-eval's task objects; local tasks never touch the network."""
        from lm_eval.tasks import TaskManager

        names = list(dict.fromkeys(self.tasks))
        stock = [name for name in names if not name.startswith("local_")]
        manager: Any = _stock_manager() if stock or self.include_defaults else None
        for name in stock:
            check_known(name, manager.all_tasks)
        try:
            with tempfile.TemporaryDirectory() as folder:
                for name in set(names) - set(stock):
                    text = json.dumps(local_config(name))  # JSON is YAML
                    Path(folder, f"{name}.yaml").write_text(text, encoding="utf-8")
                # a second manager: one with lm-eval's own tasks would index thousands of files
                own = TaskManager(include_path=folder, include_defaults=False)
                local = own.load([name for name in names if name not in stock])
            return (manager or own).load([*local["tasks"].values(), *stock])
        except InputError:
            raise
        except Exception as error:  # whatever datasets, its builders and the hub client raise
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"the data of tasks {', '.join(names)} cannot be loaded ({reason}); local tasks "
                "need readable files in $RERAIL_DATA/eval, all others need the network"
            ) from error

    def _set_shots(self, task: Any) -> None:
        # A task that fixes zero examples (BLiMP) has no prompt to which examples could be added.
        if task.get_config("num_fewshot") != 0 and self.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=self.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own default, so that scores compare

    def _positions(self, tasks: Mapping[str, Any]) -> dict[str, list[int]] | None:
        """Return which documents of each task are scored; None for all."""
        if self.limit is None:
            return None
        return {
            name: evenly_spaced(len(task.eval_docs), self.limit) for name, task in tasks.items()
        }


def evenly_spaced(total: int, limit: int) -> list[int]:
    """Return min(total, limit) distinct positions, evenly spaced over range(total)."""
    count = min(total, limit)
    return [i * total // count for i in range(count)]


def task_scores(results: Mapping[str, Mapping[str, Any]]) -> list[TaskScore]:
    """Return lm-eval's results, {task: {"metric,filter": value}}, as a list of scores."""
    scores = []
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            name = metric if filter_name == "none" else key
            se = finite_or_none(values.get(f"{metric}_stderr,{filter_name}"))
            counts = values.get("sample_count", {})  # only groups have it, one count a metric
            n = int(counts.get(key, values["sample_len"]))
            scores.append(TaskScore(task=task, metric=name, value=float(value), se=se, n=n))
    return scores


def finite_or_none(value: Any) -> float | None:
    """Return a finite float, or None for lm-eval's other answers ("N/A", None, nan)."""
    if isinstance(value, str) or value is None or not math.isfinite(value):
        return None
    return float(value)


@functools.cache
def _stock_manager() -> Any:
    from lm_eval.tasks import TaskManager

    log.info("indexing lm-eval's own tasks (some seconds)")
    return TaskManager()


@contextlib.contextmanager
def _training_modes_restored(model: PreTrainedModel) -> Iterator[None]:
    """Undo HFLM's `model.eval()`, module by module."""
    training = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's prints off standard output and its bootstrap in this process."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
