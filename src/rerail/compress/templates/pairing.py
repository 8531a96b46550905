"""Pairings: two experts share one array of magnitudes in each matrix. Open: `merge`.

The router keeps its E rows, and each expert of a pair its signs and a mask: see
`rerail.experts.puzzle`.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Compressor, Decision, untouched
from rerail.compress.solvers.pairing import annealed_pairs, stacked
from rerail.errors import InputError, OutOfReach
from rerail.experts.base import BankSpec
from rerail.experts.puzzle import LOWEST, PuzzleExperts, Shared, tensors_of
from rerail.moe.model import MoELayer
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, Statistic

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Pairing(Compressor):
    """Pairs 2 P experts of a layer; a count is of the arrays that it then stores, E - P.

    A ratio R asks for P = int(R E / saved), where a pair saves one expert in words, and as many as
    its bits come to in other stores. Biases belong to no pair: where there are some, a little less
    goes, as the plan's lineage says.

    Attributes:
        pairs: who is paired: 2 P experts drawn at random, in random pairs; `least`: those that the
            fewest tokens chose, in random pairs; `searched`: drawn, then annealed in `steps`
            exchanges of partners towards less sum ||W - W'||^2.
        store: `words` of 16 bits, which hold bfloat16; `float`, in the experts' own dtype with
            four bits beside it; `codes` of `bits` bits with a scale for `group` numbers of a row.
        seed: of the draws in each layer.
        run: `stored` decodes chosen experts in every forward; `materialised` keeps all decoded.
    """

    pairs: Literal["random", "least", "searched"] = "random"
    store: Literal["words", "float", "codes"] = "words"
    bits: int = 3
    group: int = 128
    steps: int = 200
    seed: int = 0
    run: Literal["stored", "materialised"] = "stored"

    paradigm: ClassVar[str] = "merging"
    allocations: ClassVar[Literal["any", "fixed", "uniform"]] = "fixed"

    @property
    def written_out(self) -> Literal["no", "yes", "never"]:
        return "yes"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.group < 1 or self.steps < 0:
            raise InputError(
                f"compressor.bits={self.bits} must be 1 to 8, group={self.group} at least 1 and "
                f"steps={self.steps} at least 0"
            )

    @property
    def measures(self) -> tuple[Statistic, ...]:
        """The statistics that merging reads; none by default."""
        return ()

    @property
    def requires(self) -> tuple[Statistic, ...]:
        counts = (Count(),) if self.pairs == "least" else ()
        return tuple(dict.fromkeys((*self.measures, *counts)))

    @abstractmethod
    def merge(
        self, statistics: LayerStatistics, name: str, pair: Pair, matrices: Sequence[Tensor]
    ) -> Shared:
        """Return what the `gate`, `up` or `down` matrices (out, in) of two experts share.

        Args:
            statistics: of the layer.
            name: of the matrix.
            pair: the two experts.
            matrices: theirs, in float32 or wider.
        """

    def spec(self, layer: MoELayer, paired: Sequence[int]) -> BankSpec:
        """Return the stored form for these experts, pair after pair."""
        integers: Mapping[str, Any] = {"pairs": tuple(paired)}
        if self.store == "codes":
            integers = {**integers, "bits": self.bits, "group": self.group}
        options = {"store": self.store} | ({} if self.run == "stored" else {"run": self.run})
        return BankSpec("puzzle", layer.num_experts, (), integers, options)

    def saved(self, layer: MoELayer) -> float:
        """Return what one pair saves, in experts of 16 bits."""
        sizes = [
            sum(PuzzleExperts.predicted_bits(self.spec(layer, p), 0, layer.dims, 16).values())
            for p in ((), (0, 1))
        ]
        return (sizes[0] - sizes[1]) / (48 * layer.hidden_size * layer.intermediate_size)

    def count(self, layer: MoELayer, removed: float) -> int:
        """Return how many arrays a layer stores."""
        experts, saved = layer.num_experts, self.saved(layer)
        pairs = int(removed * experts / saved + 1e-9)
        if pairs > experts // 2:
            raise OutOfReach(
                f"layer {layer.index} cannot lose {removed:.4g} of its experts in pairs, of which "
                f"{experts} experts make {experts // 2} that save {saved:.4g} each; allowed "
                f"ratios: 0 to {experts // 2 * saved / experts:.4g}"
            )
        return experts - pairs

    def decide_layer(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Decision:
        paired = self.paired(layer, statistics, layer.num_experts - count)
        spec, solved, raised = self.spec(layer, paired), dict[str, Tensor](), 0.0
        rest = torch.tensor([e for e in range(layer.num_experts) if e not in paired]).long()
        for name, stack in layer.stack()._asdict().items():
            each = [self._merged(statistics, name, stack, p) for p in _in_pairs(paired)]
            shared = stacked(each, stack[0])
            where = f"layer {layer.index}: {name}"
            parts = tensors_of(shared, spec, stack.dtype, where)
            parts["dense"] = stack.detach()[rest.to(stack.device)]
            solved |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            low = (shared.magnitude < 2.0 ** (LOWEST - 127)) & (shared.magnitude > 0)
            raised += float(low.double().mean()) / 3 if len(each) else 0.0
        note = f"layer {layer.index}: {raised:.2%} of shared magnitudes were raised to 2^-15"
        told = self.store == "words" and raised >= 1e-3
        return Decision(untouched(layer, spec), solved, (note,) if told else ())

    def paired(self, layer: MoELayer, statistics: LayerStatistics, num_pairs: int) -> list[int]:
        """Return 2 P experts, pair after pair."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(layer.num_experts, generator=generator)
        if self.pairs == "least":
            fewest = torch.argsort(statistics[Count()], stable=True)[: 2 * num_pairs]
            order = order[torch.isin(order, fewest)]
        drawn: list[int] = order[: 2 * num_pairs].tolist()
        if self.pairs != "searched":
            return drawn
        stacks = layer.stack()._asdict()

        def error(i: int, j: int) -> float:
            each = (
                (stack, self._merged(statistics, n, stack, (i, j))) for n, stack in stacks.items()
            )
            return sum(
                float((stack[[i, j]].abs() - s.masks * s.magnitude).double().square().sum())
                for stack, s in each
            )

        return annealed_pairs(drawn, error, generator, self.steps)

    def _merged(self, statistics: LayerStatistics, name: str, stack: Tensor, pair: Pair) -> Shared:
        wide = torch.promote_types(stack.dtype, torch.float32)
        return self.merge(statistics, name, pair, [stack[e].detach().to(wide) for e in pair])


def _in_pairs(paired: Sequence[int]) -> list[Pair]:
    return list(zip(paired[::2], paired[1::2], strict=True))
