"""What the functions of `rerail.api` hand to each other, and what their arguments mean."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rerail.compress.base import Compressor
from rerail.config.presets import preset
from rerail.distill.repair import Repair
from rerail.distill.settings import RouterKD
from rerail.errors import InputError, OutOfReach
from rerail.evaluate.perplexity import Progress
from rerail.evaluate.scores import Scores
from rerail.files import digest
from rerail.moe.model import MoEModel
from rerail.moe.source import ModelSource
from rerail.parallel import broadcast_from_first
from rerail.plan.budget import Bits, Budget, Ratio, Skip
from rerail.plan.plan import Plan
from rerail.plan.sizes import Sizes
from rerail.statistics.statistic import Statistic, StatisticSet
from rerail.text.calibration import TokenBlocks
from rerail.text.tokens import check_block, plain_ids, prefix_ids

BLOCK = 256  # tokens, where text is plain strings

Method = str | Compressor
Text = TokenBlocks | Sequence[str]


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer and, for a student, what made it.

    Attributes:
        model: its MoE layers, body and head.
        tokenizer: of transformers.
        source: where the teacher was loaded from.
        plan: of a student; None for a teacher.
        method, budget: of a student, where they are known.
    """

    model: MoEModel
    tokenizer: Any
    source: ModelSource
    plan: Plan | None = None
    method: Compressor | None = None
    budget: Budget | None = None

    @property
    def sizes(self) -> Sizes:
        """Numbers and bytes, in the dtype of the teacher's checkpoint."""
        return Sizes.of(self.model, self.source.itemsize())


@dataclass(frozen=True)
class Repaired:
    """What a repair leaves.

    Attributes:
        student: the repaired student; the one that was handed in keeps its router.
        fit: KL before, at the best and at the last step, the curve, and router rows.
        policies: a skipper's thresholds, fitted anew on the repaired router; None for others.
    """

    student: LanguageModel
    fit: Repair
    policies: Plan | None = None


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

    def statistics(
        self,
        teacher: LanguageModel,
        text: TokenBlocks,
        wanted: Sequence[Statistic],
        make: Callable[[Sequence[Statistic]], StatisticSet],
    ) -> StatisticSet:
        """Return the statistics that are wanted; `make` collects those that it is called with."""
        return make(wanted)

    def plan(self, teacher: LanguageModel, make: Callable[[], Plan | None]) -> Plan:
        """Return the plan, the same on all processes; `make` returns it on the first at least."""
        made = make()
        return cast(Plan, broadcast_from_first(lambda: made))

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


def as_method(method: Method) -> Compressor:
    """Return a method, by the name of its preset or as it is."""
    return cast(Compressor, preset("compressor", method)) if isinstance(method, str) else method


_EXAMPLE = {Ratio: "Ratio(0.5), or 0.5", Bits: "Bits(4), or 4", Skip: "Skip(0.25), 0.25 or None"}


def as_budget(budget: Budget | float | None, method: Compressor) -> Budget:
    """Return what a number means to a method: the removed share, bits, or the skipped share."""
    kind: Any = method.budget
    asked: Any = budget
    if not isinstance(asked, kind):
        if isinstance(asked, Ratio | Bits | Skip) or (asked is None and kind is not Skip):
            raise OutOfReach(
                f"{type(method).__name__} is swept by {kind.__name__}, not by {asked!r}; "
                f"give {_EXAMPLE[kind]}"
            )
        asked = kind(asked)
    made: Budget = asked
    return made


def as_settings(distill: str | RouterKD, **fields: Any) -> RouterKD:
    """Return the settings of a repair, by the name of their preset or as they are.

    Raises:
        InputError: there is no such preset, or it repairs nothing.
    """
    settings = preset("distill", distill, **fields) if isinstance(distill, str) else distill
    if not settings.enabled:
        raise InputError(f"distill={distill!r} repairs nothing; name other settings")
    return cast(RouterKD, settings)


def as_blocks(teacher: LanguageModel, text: Text) -> TokenBlocks:
    """Return text as blocks.

    Raises:
        InputError: it is the name of a preset, too short, or longer than the model has positions.
    """
    if isinstance(text, TokenBlocks):
        check_block(text.input_ids.shape[1], teacher.model.config)
        return text
    if isinstance(text, str):
        raise InputError(f"text={text!r} is one string; give api.text(teacher, 'mix') or a list")
    return as_blocks(teacher, blocks_of_strings(teacher.tokenizer, text))


def blocks_of_strings(tokenizer: Any, strings: Sequence[str], block: int = BLOCK) -> TokenBlocks:
    """Return one block a string, cut after `block` tokens and padded to the longest."""
    prefix = prefix_ids(tokenizer)
    rows = [[*prefix, *plain_ids(tokenizer, string)][:block] for string in strings]
    rows = [row for row in rows if len(row) >= 2]
    if not rows:
        raise InputError(
            f"none of the {len(strings)} strings of text has 2 tokens; give longer ones, or a "
            "preset such as 'mix'"
        )
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return TokenBlocks(ids, mask, digest([ids.tolist(), mask.tolist()]))


def needed_text(teacher: LanguageModel, text: Text | None, method: Compressor) -> TokenBlocks:
    """Return the text that a method must be measured on."""
    if text is None:
        raise InputError(
            f"{type(method).__name__} measures the model on calibration text and there is none; "
            "give text, e.g. api.text(teacher), or statistics where the method is not sequential"
        )
    return as_blocks(teacher, text)


def check_statistics(teacher: LanguageModel, method: Compressor, filled: StatisticSet) -> None:
    """Raise InputError where statistics that a method needs are not there."""
    for layer in teacher.model.layers:
        there = filled.tensors.get(layer.index, {})
        if missing := [s.name for s in method.requires if s.name not in there]:
            raise InputError(
                f"statistics={', '.join(there) or 'nothing'} lack {missing[0]} of layer "
                f"{layer.index}; collect what {type(method).__name__} needs"
            )
