"""Quantisers: every expert is kept, as integer codes of few bits. Open: `encode`.

Bits are those of the codes; scales and zeros come on top, as the papers count, and the plan's notes
give the effective bits with them. The router stays as it is.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.base import Compressor, Decision, untouched
from rerail.errors import InputError, OutOfReach
from rerail.experts.base import BankSpec, Integer
from rerail.experts.quantized import DENSE, Coded, QuantizedExperts, buckets, pack
from rerail.moe.model import MoELayer
from rerail.plan.budget import Bits, Budget, numbers_kept
from rerail.statistics.statistic import LayerStatistics
from rerail.transfer import free_bytes

WIDTHS = (1, 2, 3, 4, 8, DENSE)
_AT_ONCE = 2**26  # numbers of matrices or moments that are encoded together, more on a large GPU

# gives the (n, in, in) second moments of some experts, by their numbers (n,)
MomentsOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Quantiser(Compressor):
    """Stores every expert in the same bits; a count is the sum of a layer's experts' bits.

    Attributes:
        run: `stored` decodes chosen experts in every forward; `materialised` keeps all decoded.
        group: G, how many numbers along the input axis share a scale and a zero.
    """

    run: Literal["stored", "materialised"] = "stored"
    group: int = 128

    paradigm: ClassVar[str] = "quantisation"
    budget: ClassVar[type[Budget]] = Bits
    allocations: ClassVar[Literal["any", "fixed", "uniform"]] = "uniform"

    @property
    def written_out(self) -> Literal["no", "yes", "never"]:
        return "yes"

    def __post_init__(self) -> None:
        if self.group < 1:
            raise InputError(f"compressor.group={self.group} must be at least 1")

    @abstractmethod
    def encode(self, stack: Tensor, moment: Tensor | None, bits: int) -> Coded:
        """Return codes, scales and zeros.

        Args:
            stack: (n, out, in) matrices; scales and zeros are rounded to their dtype.
            moment: (n, in, in) sums of x x^T over the inputs x of each, where `moments` gives any.
            bits: of the codes, below 16.
        """

    def encode_rows(
        self, rows: Tensor, moment: Tensor | None, widths: Mapping[int, int]
    ) -> dict[int, Coded]:
        """Return codes (w, in) by bits.

        Args:
            rows: (out, in).
            moment: (in, in) sum of x x^T over the inputs x, where `moments` gives any.
            widths: how many of the rows, one class after the other, have so many bits; those of 16
                bits and classes without rows get no codes.
        """
        moments = None if moment is None else moment.unsqueeze(0)
        return by_classes(rows, widths, lambda own, bits: self.encode(own, moments, bits))

    def encode_columns(
        self, columns: Tensor, moment: Tensor | None, widths: Mapping[int, int]
    ) -> dict[int, Coded]:
        """Return codes (w, out) by bits, where each column has groups of its own along `out`.

        By default columns (out, in) are encoded as rows, without regard to their inputs.
        """
        return self.encode_rows(columns.mT, None, widths)

    def moments(self, layer: MoELayer, statistics: LayerStatistics) -> Mapping[str, MomentsOf]:
        """Return what gives second moments for gate, up and down; none by default."""
        return {}

    def remarks(self, layer: MoELayer, statistics: LayerStatistics) -> tuple[str, ...]:
        """Return what the plan's notes should say about a layer; nothing by default."""
        return ()

    def count(self, layer: MoELayer, removed: float) -> int:
        """Return the bits that the experts of a layer share: a width that can be packed each."""
        if round(average := DENSE * (1 - removed), 9) not in WIDTHS:
            raise OutOfReach(
                f"{type(self).__name__} cannot reach an average of {average:g} bits: it gives "
                "every expert the same; allowed averages: 1, 2, 3, 4, 8 (16 changes nothing)"
            )
        return numbers_kept(DENSE * layer.num_experts, removed)

    def decide_layer(self, layer: MoELayer, statistics: LayerStatistics, count: int) -> Decision:
        bits = (count // layer.num_experts,) * layer.num_experts
        return quantised(layer, statistics, bits, self, self.run)


def by_classes(
    rows: Tensor, widths: Mapping[int, int], encode: Callable[[Tensor, int], Coded]
) -> dict[int, Coded]:
    """Return codes by bits of rows (out, in) that lie class after class, as stacks (1, w, in)."""
    classes = zip(widths, torch.split(rows, list(widths.values())), strict=True)
    return {
        bits: Coded(*(part[0] for part in encode(own.unsqueeze(0), bits)))
        for bits, own in classes
        if bits != DENSE and len(own)
    }


def quantised(
    layer: MoELayer,
    statistics: LayerStatistics,
    bits: tuple[int, ...],
    quantiser: Quantiser,
    run: str,
) -> Decision:
    """Return the decision that stores expert e in bits[e], encoded by a quantiser."""
    sizes: dict[str, Integer] = {"bits": bits, "group": quantiser.group}
    options = {"run": run}
    spec = BankSpec("quantized", len(bits), (), sizes, {} if run == "stored" else options)
    moments, solved = quantiser.moments(layer, statistics), dict[str, Tensor]()
    for name, stack in layer.stack()._asdict().items():
        for width, experts in buckets(spec).items():
            parts = _encoded(quantiser, stack.detach(), moments.get(name), width, experts)
            solved |= {f"{name}.b{width}.{part}": t for part, t in parts.items()}
    size = f"{sum(bits) / len(bits):.4g} bits a number, {effective_bits(spec, layer):.6g}"
    remarks = (f"{size} with scales and zeros of 16", *quantiser.remarks(layer, statistics))
    notes = tuple(f"layer {layer.index}: {remark}" for remark in remarks)
    return Decision(untouched(layer, spec), solved, notes)


def _encoded(
    quantiser: Quantiser,
    stack: Tensor,
    moments: MomentsOf | None,
    bits: int,
    experts: Sequence[int],
) -> dict[str, Tensor]:
    """Return the packed tensors of the experts that have these bits, a few experts at a time."""
    if bits == DENSE:
        return {"dense": stack[torch.tensor(experts)].clone()}
    out, inner = stack.shape[1:]
    most = max(_AT_ONCE, free_bytes(stack.device) // 64)  # eight temporaries of eight bytes
    few = max(1, most // (inner * (out if moments is None else max(out, inner))))
    done = []
    for some in torch.split(torch.tensor(experts), few):
        moment = None if moments is None else moments(some)
        codes, scale, zero = quantiser.encode(stack[some], moment, bits)
        done.append((pack(codes.flatten(-2), bits), scale, zero))
    codes, scale, zero = (torch.cat(parts) for parts in zip(*done, strict=True))
    return {"codes": codes, "scale": scale} | ({"zero": zero} if bits > 1 else {})


def effective_bits(spec: BankSpec, layer: MoELayer) -> float:
    """Return bits for each number of a matrix, scales and zeros (16 bits each) included."""
    counted = QuantizedExperts.predicted_bits(spec, layer.index, layer.dims, 16)
    solved = QuantizedExperts.shapes(spec, layer.dims)
    weights = 3 * layer.num_experts * layer.hidden_size * layer.intermediate_size
    return sum(counted[layer.index, name] for name in solved) / weights
