"""What listens to the functions of `rerail.api`, and may keep what they make."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rerail.distill.repair import Repair
from rerail.evaluate.scores import Scores
from rerail.language_model import LanguageModel
from rerail.parallel import broadcast_from_first
from rerail.plan.plan import Plan
from rerail.statistics.collect import Progress
from rerail.statistics.statistic import Statistic, StatisticSet
from rerail.text.calibration import Calibration, TokenBlocks


class Recorder:
    """Hears of every part that is made, and may know it from an earlier run; this one does not.

    Every `make` returns the part. In a group of processes all of them call it, or none.

    Attributes:
        folder: where a fit that is killed leaves what it goes on from; None: nowhere.
    """

    folder: Path | None = None

    def progress(self, label: str) -> Progress:
        """Return what wraps batches, to show a bar."""
        return lambda batches: batches

    def point(self, point: Mapping[str, float], steps: int) -> None:
        """Hear of a point of a fit of so many steps, on the first process.

        It is {step, batch_kl} or {step, train_kl, val_kl}, nats a token.
        """

    def text(
        self,
        calibration: Calibration,
        tokenizer: PreTrainedTokenizerBase,
        make: Callable[[], TokenBlocks],
    ) -> TokenBlocks:
        """Return the blocks of a text; in a group the first process calls this alone."""
        return make()

    def statistics(
        self,
        teacher: LanguageModel,
        text: TokenBlocks,
        wanted: Sequence[Statistic],
        make: Callable[[Sequence[Statistic]], StatisticSet],
    ) -> StatisticSet:
        """Return the statistics that are wanted; `make` collects those that it is called with."""
        return make(wanted)

    def plan(self, make: Callable[[], Plan | None]) -> Plan:
        """Return the plan, the same on all processes; `make` returns it on the first at least."""
        made = make()
        return cast(Plan, broadcast_from_first(lambda: made))

    def fitness(
        self,
        teacher: LanguageModel,
        text: TokenBlocks,
        what: Sequence[Any],
        make: Callable[[], float],
    ) -> float:
        """Return how good a student of a search is on a text; `what` names it in plain data."""
        return make()

    def states(
        self, teacher: LanguageModel, text: TokenBlocks, make: Callable[[], Tensor]
    ) -> Tensor:
        """Return the teacher's final hidden states (N, S, H) on a text."""
        return make()

    def fit(self, make: Callable[[], Repair]) -> Repair:
        """Return the fit of a router."""
        return make()

    def policies(self, make: Callable[[], Plan]) -> Plan:
        """Return policies that were fitted on a repaired router."""
        return make()

    def scores(
        self,
        stage: str,
        model: LanguageModel,
        texts: Mapping[str, TokenBlocks],
        make: Callable[[], Scores],
    ) -> Scores:
        """Return the scores of the stage `teacher`, `compressed` or `repaired`."""
        return make()


SILENT = Recorder()
