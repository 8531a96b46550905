"""Sizes of a model, counted from its tensors or predicted from a plan."""

from dataclasses import dataclass

from rerail.moe.model import MoEModel
from rerail.plan.plan import Plan


@dataclass(frozen=True)
class Sizes:
    """What a model stores.

    Attributes:
        total: numbers in the checkpoint.
        routed: numbers in stored routed experts.
        active: numbers used for one token.
        bytes: of the checkpoint.
        routed_bytes: of its routed experts.
    """

    total: int
    routed: int
    active: int
    bytes: int
    routed_bytes: int

    @classmethod
    def of(cls, model: MoEModel, itemsize: int) -> "Sizes":
        """Count a model from its tensors; a dense number takes `itemsize` bytes."""
        total, routed = model.parameters_total(), model.parameters_routed()
        bits = model.bits_routed(8 * itemsize)
        return cls.from_counts(total, routed, model.parameters_active(), bits, itemsize)

    @classmethod
    def from_counts(cls, total: int, routed: int, active: int, bits: int, itemsize: int) -> "Sizes":
        """Put sizes together from numbers, and from the bits of routed experts."""
        stored = -(-bits // 8)
        return cls(total, routed, active, (total - routed) * itemsize + stored, stored)

    @classmethod
    def predicted(cls, teacher: MoEModel, plan: Plan, itemsize: int) -> "Sizes":
        """Return the sizes of a plan's student; the teacher may lie on the meta device."""
        before, layers = cls.of(teacher, itemsize), teacher.layers
        routed, rows = plan.stored(layers), plan.rows_removed(layers)
        total = before.total - (before.routed - routed) - rows
        bits = plan.stored_bits(layers, 8 * itemsize)
        active = total - routed + round(plan.used(layers))
        return cls.from_counts(total, routed, active, bits, itemsize)

    def removed_of_experts(self, teacher: "Sizes") -> float:
        """Return the removed share of the bytes of routed experts."""
        return 1 - self.routed_bytes / teacher.routed_bytes

    def removed_of_model(self, teacher: "Sizes") -> float:
        """Return the removed share of the bytes of the whole model."""
        return 1 - self.bytes / teacher.bytes
