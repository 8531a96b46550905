"""A cell's parts on disk: what one run makes, the next one reads back.

All artefacts of a cell are read and written here. Those of the teacher lie in the cache, for every
cell of the same model; the others in the cell's folder.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rerail.distill.repair import Repair, repair
from rerail.evaluate.continuation import continuation
from rerail.evaluate.perplexity import Progress
from rerail.evaluate.scores import Scores, score_texts
from rerail.files import cache_dir
from rerail.parallel import read_or_make, run_on_first
from rerail.parts import LanguageModel, Recorder
from rerail.plan.plan import Plan
from rerail.run.cell import Cell
from rerail.run.cost import peak_memory, start_peak, with_cost
from rerail.run.mirror import Live
from rerail.run.progress import bar, report_progress
from rerail.statistics.cached import cached_statistics
from rerail.statistics.statistic import Statistic, StatisticSet
from rerail.store import Artefact, Code, get, read, write
from rerail.teacher.hidden_states import final_hidden_states
from rerail.text.calibration import TokenBlocks


@dataclass(frozen=True)
class Cost:
    """What making a part cost: wall time in seconds, and peak memory of the process in bytes."""

    seconds: float
    peak_memory: int


class CellRecorder(Recorder):
    """Keeps the parts of one cell, and shows how far it is.

    Args:
        cell: its choices.
        folder: of the cell.
        live: where the points of its fit are shown.

    Attributes:
        costs: by `plan`, `repair` and the stages that were scored.
    """

    folder: Path

    def __init__(self, cell: Cell, folder: Path, live: Live):
        self.cell, self.folder, self.live = cell, folder, live
        self.costs: dict[str, Cost] = {}

    def progress(self, label: str) -> Progress:
        """Return a progress bar, which the status file follows."""
        return bar(label)

    def point(self, point: Mapping[str, float], steps: int) -> None:
        """Show a point, and tell the status file how far the fit is."""
        self.live.point(point)
        if "batch_kl" in point:
            report_progress("step", int(point["step"]), steps)

    def statistics(
        self,
        teacher: LanguageModel,
        text: TokenBlocks,
        wanted: Sequence[Statistic],
        make: Callable[[Sequence[Statistic]], StatisticSet],
    ) -> StatisticSet:
        """Collect in one pass what the cache lacks.

        In a group of processes all collect, and the first one has them all.
        """
        key = self._key(teacher, text.fingerprint, self.cell.calibration.batch_size)
        return cached_statistics(cache_dir() / "statistics" / key, wanted, make)

    def plan(self, teacher: LanguageModel, make: Callable[[], Plan | None]) -> Plan:
        """Keep plan.json, and beside it what making it cost (statistics included)."""
        path, beside = self.folder / "plan.json", self.folder / "plan.cost.json"

        def stored() -> tuple[Plan, Cost] | None:
            known, cost = Plan.load(path), read(beside)
            if known is None or cost is None:
                return None
            known.validate(teacher.model.layers)
            return known, Cost(**cost.data)

        def measured() -> tuple[Plan | None, Cost]:
            start_peak()
            start = time.perf_counter()
            made = make()
            return made, Cost(time.perf_counter() - start, peak_memory())

        def put(measurement: tuple[Plan | None, Cost]) -> tuple[Plan, Cost]:
            made, cost = measurement
            assert made is not None  # on the first process
            made.save(path)
            write(beside, Artefact(dataclasses.asdict(cost)))
            return made, cost

        plan, self.costs["plan"] = read_or_make(stored, measured, put)
        return plan

    def states(
        self, teacher: LanguageModel, text: TokenBlocks, make: Callable[[], Tensor]
    ) -> Tensor:
        """Keep the teacher's states in the cache."""
        key = self._key(teacher, text.fingerprint, self.cell.calibration.batch_size)
        path = cache_dir() / "teacher" / f"{key}.json"
        stored = get(path, lambda: Artefact({}, {"hidden": make()}), [final_hidden_states])
        return stored.tensors["hidden"]

    def fit(self, make: Callable[[], Repair]) -> Repair:
        """Keep repair.json with the curve, and the rows before and after beside it."""

        def plain() -> Artefact:
            made = make()
            data = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
            rows = {side: data.pop(side) for side in ("before", "after")}
            tensors = {f"{side}.{n}": t for side in rows for n, t in rows[side].items()}
            return Artefact(data, tensors)

        data, tensors = self._kept("repair", self.folder / "repair.json", plain, [repair])
        rows: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}}
        for name, tensor in tensors.items():
            side, _, part = name.partition(".")
            rows[side][part] = tensor
        return Repair(**data, before=rows["before"], after=rows["after"])

    def policies(self, make: Callable[[], Plan]) -> Plan:
        """Keep policy.json."""
        path = self.folder / "policy.json"

        def write(made: Plan) -> Plan:
            made.save(path)
            return made

        return read_or_make(lambda: Plan.load(path), make, write)

    def scores(
        self,
        stage: str,
        model: LanguageModel,
        texts: Mapping[str, TokenBlocks],
        make: Callable[[], Scores],
    ) -> Scores:
        """Keep <stage>.json; the teacher's scores lie in the cache."""
        path = self.folder / f"{stage}.json"
        if stage == "teacher":
            prints = {name: t.fingerprint for name, t in texts.items()}
            key = self._key(model, prints, self.cell.evaluation.batch_size)
            path = cache_dir() / "scores" / f"{key}.json"

        def plain() -> Artefact:
            made = make()
            return Artefact(made.plain(), made.tensors)

        data, tensors = self._kept(stage, path, plain, [score_texts])
        return Scores.from_plain(data, tensors)

    def seen(
        self, stage: str, model: LanguageModel, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Keep <stage>.seen.json: what is looked at rather than counted, and lm-eval's tasks.

        The teacher is asked once for every cell of the same model.
        """
        path = self.folder / f"{stage}.seen.json"
        if stage == "teacher":
            choices = self.cell.evaluation
            tasks = choices.tasks and choices.tasks.fingerprint()
            key = self._key(model, self.cell.prompt, self.cell.seed, choices.new_tokens, tasks)
            path = cache_dir() / "scores" / f"{key}.seen.json"
        tasks = self.cell.evaluation.tasks
        code: list[Code] = [continuation, *([] if tasks is None else [type(tasks)])]
        return self._kept(
            f"{stage}.seen", path, lambda: run_on_first(lambda: Artefact(make())), code
        )[0]

    def _key(self, teacher: LanguageModel, *what: Any) -> str:
        return self.cell.key_of(teacher.model, *what)

    def _kept(
        self,
        name: str,
        path: Path,
        make: Callable[[], Artefact | None],
        code: Sequence[Code],
    ) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """Return a part as plain data and tensors, and note what making it cost."""
        data, tensors = get(path, with_cost(make), code)
        data = dict(data)
        self.costs[name] = Cost(data.pop("seconds"), data.pop("peak_memory"))
        return data, tensors
