"""Banks: the modules that stand in for `experts` and hold their stored weights.

A bank has the signature of a transformers experts module,
`(hidden (T, H), index (T, K), weights (T, K)) -> (T, H)`, and lets the family's own module compute:
it points a shallow copy of that module (the *shell*) at the weights that it stores. So activation,
clamps, biases and the chosen experts implementation are always the model's own.
"""

import importlib
import math
import pkgutil
import re
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

import rerail.experts
from rerail.errors import InputError
from rerail.moe.fused_experts import (
    Dims,
    ExpertWeights,
    Layout,
    dims_of,
    expert_parameters,
    shell_of,
)

Member = tuple[int, int, float]
Stored = dict[Hashable, int]
Integer = int | tuple[int, ...]


@dataclass(frozen=True)
class BankSpec:
    """Plain data that says in which form a layer's experts are stored.

    Attributes:
        kind: a module name below `rerail.experts`.
        stored: number of stored experts P.
        members: for each stored expert, the (layer, expert, weight) triples whose weighted sum it
            is; experts are numbered as the router rows of the model that the plan was made for.
            Equal entries in several layers are one stored expert. Empty for other kinds.
        integers: sizes of the form (ranks, bases, ...), one for all experts or one each.
        options: words of the form (activation, matrices, ...).
    """

    kind: str = "dense"
    stored: int = 0
    members: tuple[tuple[Member, ...], ...] = ()
    integers: Mapping[str, Integer] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)

    def integer(self, name: str) -> int:
        """Return a size that all experts share."""
        return cast(int, self.integers[name])

    def each(self, name: str) -> tuple[int, ...]:
        """Return a size that each expert has of its own."""
        return cast(tuple[int, ...], self.integers[name])

    def reads(self) -> set[int]:
        """Return the layers whose experts are members."""
        return {layer for group in self.members for layer, _, _ in group}


class ExpertBank(nn.Module):
    """Stored experts of one form, and the map from router slots to them.

    Attributes:
        spec: the plain data it was made from.
        layer: index of the decoder layer that it answers for.
        dims: sizes of the dense experts that it stands for.
        slots: int64 (number of router rows,), the row of the shell that answers each slot.
        wraps: whether it is put around whatever answers the layer, and stores no expert itself.
    """

    wraps: ClassVar[bool] = False

    slots: Tensor
    shell: nn.Module

    def __init__(self, spec: BankSpec, slots: Sequence[int], layer: int, stock: nn.Module):
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.dims = dims_of(stock)._replace(experts=len(slots))
        device = next(iter(expert_parameters(stock).values())).device
        self.register_buffer("slots", torch.tensor(slots, dtype=torch.int64, device=device))

    @property
    def config(self) -> Any:
        """The model's config, as on a stock experts module."""
        return self.shell.config

    @property
    def num_experts(self) -> int:
        """Number of router slots that this bank answers."""
        return len(self.slots)

    @property
    def layout(self) -> Layout:
        """The family's layout."""
        return Layout.of(self.shell)

    @staticmethod
    @abstractmethod
    def predicted(spec: BankSpec, layer: int, dims: Dims) -> Stored:
        """Return what `stored` will be, from plain data alone."""

    @classmethod
    def predicted_bits(cls, spec: BankSpec, layer: int, dims: Dims, width: int) -> Stored:
        """Return what `stored_bits` will be, from plain data alone."""
        return {key: n * width for key, n in cls.predicted(spec, layer, dims).items()}

    @classmethod
    def used(cls, spec: BankSpec, dims: Dims, stored: Stored) -> tuple[float, float]:  # noqa: ARG003
        """Return the numbers that every token reads, and those that each chosen expert adds."""
        return 0, dims.expert

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:  # noqa: ARG004
        """Return the shape of every solved tensor by name; none by default."""
        return {}

    @abstractmethod
    def dense(self) -> dict[str, Tensor]:
        """Return fused tensors whose leading axis `slots` indexes, under stock names."""

    @abstractmethod
    def stored(self) -> Stored:
        """Return numbers by stored thing, counted from tensors; equal keys are the same thing."""

    def stored_bits(self, width: int) -> Stored:
        """Return the bits of each stored thing, where a dense number takes `width` of them."""
        return {key: n * width for key, n in self.stored().items()}

    def numbers_used(self, chosen: float) -> float:
        """Return the numbers read for a token that `chosen` experts answer, by the tensors."""
        shared, each = self.used(self.spec, self.dims, self.stored())
        return shared + chosen * each

    def as_stock(self) -> nn.Module:
        """Return a plain experts module with one whole expert for each router slot."""
        dense = {n: t.detach()[self.slots].clone() for n, t in self.dense().items()}
        return shell_of(self.shell, dense, len(self.slots))

    def materialise(self, slot: int) -> ExpertWeights:
        """Return the expert that answers a router slot as (out, in) matrices."""
        dense, stored = self.dense(), int(self.slots[slot])
        return self.layout.unpack(dense["gate_up_proj"][stored], dense["down_proj"][stored])

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Answer router slots `index` (T, K) by the stored experts."""
        return cast(Tensor, self.shell(hidden, self.slots[index], weights))


class SolvedBank(ExpertBank):
    """Experts given by solved tensors (factors, bases, ...): a subclass says how they expand.

    With `run: materialised` the expanded experts are kept in memory (they are frozen, and expanding
    is exact up to rounding); with `run: lazy` every forward expands them anew. Solved tensors are
    held in the dtype of the experts that they replace.
    """

    def __init__(
        self,
        spec: BankSpec,
        slots: Sequence[int],
        layer: int,
        stocks: Mapping[int, nn.Module],
        tensors: Mapping[str, Tensor],
    ):
        stock = stocks[layer]
        super().__init__(spec, slots, layer, stock)
        held = expert_parameters(stock)
        like = next(iter(held.values()))
        self._names = {name: name.replace(".", "_") for name in tensors}
        for name, tensor in tensors.items():
            solved = nn.Parameter(self.cast(tensor.detach(), like), requires_grad=False)
            self.register_parameter(self._names[name], solved)
        self.shell = shell_of(stock, {}, spec.stored)
        for name in self.touched(spec):
            del self.shell._parameters[name]
        self._untouched = tuple(n for n in held if n not in self.touched(spec))
        if not self.lazy:
            self.shell = shell_of(self.shell, self.dense(), spec.stored)

    @staticmethod
    def cast(tensor: Tensor, like: Tensor) -> Tensor:
        """Return a solved tensor on the device of the experts; numbers take their dtype too."""
        return tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device)

    @property
    def lazy(self) -> bool:
        """Whether experts are expanded at every forward."""
        return self.spec.options.get("run", "materialised") == "lazy"

    @staticmethod
    @abstractmethod
    def touched(spec: BankSpec) -> frozenset[str]:
        """Return the stock parameter names that solved tensors replace; the others stay."""

    @abstractmethod
    def expand(self) -> dict[str, Tensor]:
        """Return the touched stock tensors, with leading axis P, from the solved ones."""

    def solved(self, name: str) -> Tensor:
        """Return a solved tensor by its name in the plan."""
        return self.get_parameter(self._names[name])

    def dense(self) -> dict[str, Tensor]:
        """Return the fused tensors with leading axis P."""
        with torch.no_grad():
            expanded = self.expand()
        return {**{n: self.shell.get_parameter(n) for n in self._untouched}, **expanded}

    @classmethod
    def predicted(cls, spec: BankSpec, layer: int, dims: Dims) -> Stored:
        """Return the size of each solved tensor and of what stays dense."""
        solved = {n: math.prod(shape) for n, shape in cls.shapes(spec, dims).items()}
        kept = {n: c * dims.experts for n, c in dims.numbers.items() if n not in cls.touched(spec)}
        return {(layer, n): count for n, count in {**solved, **kept}.items()}

    @staticmethod
    def common(spec: BankSpec, name: str) -> bool:  # noqa: ARG004
        """Return whether every token reads all of a solved tensor, whatever experts it chooses."""
        return False

    @classmethod
    def used(cls, spec: BankSpec, dims: Dims, stored: Stored) -> tuple[float, float]:  # noqa: ARG003
        """Return the numbers in common tensors, and an expert's mean share of the others."""
        named = cast(Mapping[tuple[int, str], int], stored)
        shared = sum(n for (_, name), n in named.items() if cls.common(spec, name))
        return shared, (sum(stored.values()) - shared) / spec.stored

    def stored(self) -> Stored:
        """Count the solved tensors and what stays dense."""
        tensors = {n: self.solved(n) for n in self._names}
        tensors |= {n: self.shell.get_parameter(n) for n in self._untouched}
        return {(self.layer, n): t.numel() for n, t in tensors.items()}

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Answer router slots `index` (T, K) by the stored experts."""
        if not self.lazy:
            return super().forward(hidden, index, weights)
        shell = shell_of(self.shell, self.dense(), self.spec.stored)
        return cast(Tensor, shell(hidden, self.slots[index], weights))


def bank_class(kind: str) -> type[ExpertBank]:
    """Return the class of a kind: `Bank` of a module below `rerail.experts`, nothing else.

    Raises:
        InputError: there is no such module.
    """
    modules = pkgutil.iter_modules(rerail.experts.__path__)
    known = sorted(m.name for m in modules if m.name != "base")
    if not re.fullmatch(r"[a-z_]+", kind) or kind not in known:
        raise InputError(f"bank kind {kind!r} is not known; allowed: {known}")
    return cast(type[ExpertBank], importlib.import_module(f"rerail.experts.{kind}").Bank)


def build_bank(
    spec: BankSpec,
    slots: Sequence[int],
    layer: int,
    stocks: Mapping[int, nn.Module],
    tensors: Mapping[str, Tensor],
) -> ExpertBank:
    """Build the bank that a spec names.

    Args:
        spec: the stored form.
        slots: the stored expert that answers each router row.
        layer: index of the layer that it answers for.
        stocks: stock experts modules by layer index: this layer's and those that members name.
        tensors: solved tensors by name.

    Raises:
        InputError: the kind is not known.
    """
    bank: Any = bank_class(spec.kind)
    return cast(ExpertBank, bank(spec, slots, layer, stocks, tensors))
