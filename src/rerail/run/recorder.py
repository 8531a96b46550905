"""A cell's parts on disk: what one run makes, the next one reads back.

All artefacts of a cell are read and written here. Those of the teacher lie in the cache, for every
cell of the same model; the others in the cell's folder.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rerail.code_version import code_version
from rerail.distill.repair import Repair, repair
from rerail.evaluate.continuation import continuation
from rerail.evaluate.fitness import plan_fitness
from rerail.evaluate.scores import Scores, score_texts
from rerail.files import cache_dir
from rerail.language_model import LanguageModel
from rerail.parallel import is_first, read_or_make, run_on_first
from rerail.plan.plan import Plan
from rerail.recorder import Recorder
from rerail.run.cell import Cell
from rerail.run.cost import Cost, with_cost
from rerail.run.mirror import Live
from rerail.run.status import Status
from rerail.statistics.cached import cached_statistics
from rerail.statistics.collect import Batch, Progress
from rerail.statistics.statistic import Statistic, StatisticSet
from rerail.store import Artefact, Code, get, read, write
from rerail.teacher.hidden_states import final_hidden_states
from rerail.text.calibration import Calibration, TokenBlocks

log = logging.getLogger(__name__)


class CellRecorder(Recorder):
    """Keeps the parts of one cell, and shows how far it is.

    Args:
        cell: its choices.
        folder: of the cell.
        status: its status file, which says how far each bar and the fit are.
        live: where the points of its fit are shown.

    Attributes:
        costs: by `plan`, `repair` and the stages that were scored.
    """

    folder: Path

    def __init__(self, cell: Cell, folder: Path, status: Status, live: Live):
        self.cell, self.folder, self.status, self.live = cell, folder, status, live
        self.costs: dict[str, Cost] = {}

    def step(self, name: str) -> None:
        """Say that a step of the cell begins."""
        log.info("%s: %s", self.folder.name, name)
        self.status.write("running", name)

    def progress(self, label: str) -> Progress:
        def over(batches: Sequence[Batch]) -> Iterator[Batch]:
            how = {"leave": False, "dynamic_ncols": True, "mininterval": 0.5}
            shown = tqdm(batches, desc=label, disable=not is_first(), **how)
            for done, batch in enumerate(shown):
                self.status.progress(label, done, len(batches))
                yield batch

        return over

    def point(self, point: Mapping[str, float], steps: int) -> None:
        self.live.point(point)
        if "batch_kl" in point:
            self.status.progress("step", int(point["step"]), steps)

    def text(
        self,
        calibration: Calibration,
        tokenizer: PreTrainedTokenizerBase,
        make: Callable[[], TokenBlocks],
    ) -> TokenBlocks:
        """Keep the blocks in the cache, where nothing but their key decides them."""
        key = calibration.store_key(tokenizer)
        if key is None:
            return make()
        path = cache_dir() / "text" / f"{key}.json"
        # not `get`, which all processes of a group would have to call
        version = code_version(Calibration, *map(type, calibration.sources))
        stored = read(path, version)
        if stored is None:
            blocks = make()
            tensors = {"input_ids": blocks.input_ids, "mask": blocks.mask}
            stored = write(path, Artefact(blocks.fingerprint, tensors), version)
        return TokenBlocks(**stored.tensors, fingerprint=stored.data)

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

    def plan(self, make: Callable[[], Plan | None]) -> Plan:
        """Keep plan.json, which `Plan.load` reads, with its cost (statistics included)."""
        path = self.folder / "plan.json"

        def plain() -> Artefact | None:
            made = make()
            return None if made is None else Artefact(made.to_json(), made.all_tensors())

        # without a version: a cell whose code has changed has lost its folder by now
        artefact = read_or_make(
            lambda: read(path), with_cost(plain), lambda made: write(path, made)
        )
        return Plan.from_json(*self._without_cost("plan", artefact))

    def fitness(
        self,
        teacher: LanguageModel,
        text: TokenBlocks,
        what: Sequence[Any],
        make: Callable[[], float],
    ) -> float:
        """Keep it in the cache, so that a search that was killed goes on where it was."""
        path = cache_dir() / "search" / f"{self._key(teacher, text.fingerprint, *what)}.json"
        code: list[Code] = [type(self.cell.compressor), plan_fitness]
        made = get(path, lambda: Artefact({"fitness": make()}), code)
        return float(made.data["fitness"])

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
            return Artefact(made.plain(), made.tensors)

        artefact = get(self.folder / "repair.json", with_cost(plain), [repair])
        return Repair.from_plain(*self._without_cost("repair", artefact))

    def policies(self, make: Callable[[], Plan]) -> Plan:
        """Keep policy.json."""
        path = self.folder / "policy.json"

        def save(made: Plan) -> Plan:
            made.save(path)
            return made

        return read_or_make(lambda: Plan.load(path), make, save)

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

        artefact = get(path, with_cost(plain), [score_texts])
        return Scores.from_plain(*self._without_cost(stage, artefact))

    def seen(
        self, stage: str, model: LanguageModel, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Keep <stage>.seen.json: what is looked at rather than counted, and lm-eval's tasks.

        The teacher is asked once for every cell of the same model.
        """
        path = self.folder / f"{stage}.seen.json"
        choices, tasks = self.cell.evaluation, self.cell.evaluation.tasks
        if stage == "teacher":
            settings = tasks and tasks.fingerprint()
            key = self._key(model, self.cell.prompt, self.cell.seed, choices.new_tokens, settings)
            path = cache_dir() / "scores" / f"{key}.seen.json"
        code: list[Code] = [continuation, *([] if tasks is None else [type(tasks)])]
        stored = get(path, lambda: run_on_first(lambda: Artefact(make())), code)
        return dict(stored.data)

    def _key(self, teacher: LanguageModel, *what: Any) -> str:
        return self.cell.key_of(teacher.model, *what)

    def _without_cost(
        self, name: str, artefact: Artefact
    ) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """Return the data and tensors of a part, and note what making it cost."""
        data = dict(artefact.data)
        self.costs[name] = Cost(data.pop("seconds"), data.pop("peak_memory"))
        return data, artefact.tensors
