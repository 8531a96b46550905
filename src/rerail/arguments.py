"""What a caller may write for a method, a budget, settings or text, and what it means."""

from collections.abc import Sequence
from typing import Any, cast

import torch

from rerail.compress.base import Compressor
from rerail.config.presets import preset
from rerail.distill.settings import Settings
from rerail.errors import InputError, OutOfReach
from rerail.files import digest
from rerail.language_model import LanguageModel
from rerail.plan.allocation import Allocation, Uniform
from rerail.plan.budget import Bits, Budget, Ratio, Skip
from rerail.statistics.statistic import StatisticSet
from rerail.text.calibration import TokenBlocks
from rerail.text.tokens import check_block, first_ids, prefix_ids

BLOCK = 256  # tokens, where text is plain strings

Method = str | Compressor
Text = TokenBlocks | Sequence[str]

_EXAMPLE = {Ratio: "Ratio(0.5), or 0.5", Bits: "Bits(4), or 4", Skip: "Skip(0.25), 0.25 or None"}


def as_method(method: Method) -> Compressor:
    """Return a method, by the name of its preset or as it is."""
    return cast(Compressor, preset("compressor", method)) if isinstance(method, str) else method


def as_budget(budget: Budget | float | None, method: Compressor) -> Budget:
    """Return what a number means to a method: the removed share, bits, or the skipped share.

    Raises:
        OutOfReach: the budget is of another kind.
    """
    kind: Any = method.budget
    if isinstance(budget, kind):
        return cast(Budget, budget)
    if isinstance(budget, Ratio | Bits | Skip) or (budget is None and kind is not Skip):
        raise OutOfReach(
            f"{type(method).__name__} is swept by {kind.__name__}, not by {budget!r}; "
            f"give {_EXAMPLE[kind]}"
        )
    return cast(Budget, kind(budget))


def as_allocation(allocation: Allocation | str | None) -> Allocation:
    """Return how layers share a budget, by the name of its preset or as it is; evenly for None."""
    if isinstance(allocation, str):
        return cast(Allocation, preset("allocation", allocation))
    return allocation or Uniform()


def as_settings(distill: str | Settings, **fields: Any) -> Settings:
    """Return the settings of a repair, by the name of their preset or as they are.

    Raises:
        InputError: there is no such preset, or it repairs nothing.
    """
    settings = preset("distill", distill, **fields) if isinstance(distill, str) else distill
    if not settings.enabled:
        raise InputError(f"distill={distill!r} repairs nothing; name other settings")
    return cast(Settings, settings)


def as_blocks(tokenizer: Any, text: Text, block: int = BLOCK) -> TokenBlocks:
    """Return text as blocks; each string becomes one, cut after `block` tokens and padded.

    Raises:
        InputError: it is the name of a preset, or too short.
    """
    if isinstance(text, TokenBlocks):
        return text
    if isinstance(text, str):
        raise InputError(f"text={text!r} is one string; give api.text(teacher, 'mix') or a list")
    prefix = prefix_ids(tokenizer)
    rows = [[*prefix, *first_ids(tokenizer, string, block)][:block] for string in text]
    rows = [row for row in rows if len(row) >= 2]
    if not rows:
        raise InputError(
            f"none of the {len(text)} strings of text has 2 tokens; give longer ones, or a "
            "preset such as 'mix'"
        )
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return TokenBlocks(ids, mask, digest([ids.tolist(), mask.tolist()]))


def blocks_for(teacher: LanguageModel, text: Text) -> TokenBlocks:
    """Return text as blocks that a model can read.

    Raises:
        InputError: as `as_blocks`, or they are longer than the model has positions.
    """
    blocks = as_blocks(teacher.tokenizer, text)
    check_block(blocks.input_ids.shape[1], teacher.model.config)
    return blocks


def check_statistics(statistics: StatisticSet, method: Compressor, layers: Sequence[int]) -> None:
    """Check that a method finds what it needs of every layer.

    Raises:
        InputError: a statistic of a layer is not there.
    """
    for layer in layers:
        there = statistics.tensors.get(layer, {})
        if missing := [s.name for s in method.requires if s.name not in there]:
            raise InputError(
                f"statistics={', '.join(there) or 'nothing'} lack {missing[0]} of layer "
                f"{layer}; collect what {type(method).__name__} needs"
            )
