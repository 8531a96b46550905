"""A model with its tokenizer, and what a repair makes of one."""

from dataclasses import dataclass
from typing import Any

from rerail.compress.base import Compressor
from rerail.distill.repair import Repair
from rerail.moe.model import MoEModel
from rerail.moe.source import ModelSource
from rerail.plan.budget import Budget
from rerail.plan.plan import Plan
from rerail.plan.sizes import Sizes


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
