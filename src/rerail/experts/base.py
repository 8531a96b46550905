"""Banks: the modules that stand in the place of `experts` and own the stored weights.

A bank has the signature of a transformers experts module,
`(hidden (T, H), index (T, K), weights (T, K)) -> (T, H)`, and lets the family's own module compute:
it points a shallow copy of that module (the *shell*) at the weights that it stores. So activation,
clamps, biases and the chosen experts implementation are always the model's own.
"""

import importlib
import pkgutil
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

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


class BankParts(NamedTuple):
    """What a bank is built from.

    Attributes:
        spec: the stored form.
        slots: the stored expert that answers each router row.
        layer: index of the layer that it answers for.
        stocks: experts modules by layer index: this layer's and those that members name.
        tensors: solved tensors by name.
    """

    spec: BankSpec
    slots: Sequence[int]
    layer: int
    stocks: Mapping[int, nn.Module]
    tensors: Mapping[str, Tensor]

    @property
    def stock(self) -> nn.Module:
        """The experts that the bank replaces."""
        return self.stocks[self.layer]

    @property
    def like(self) -> Tensor:
        """A weight of these experts, for its device and dtype."""
        return next(iter(expert_parameters(self.stock).values()))


class StoredForm(NamedTuple):
    """What a checkpoint holds of a bank.

    Attributes:
        spec: the plain data that builds it again.
        slots: the stored expert that answers each router row.
        experts: stock tensors that it reads, by name, with a leading axis of experts.
        solved: its solved tensors by their names in the plan.
    """

    spec: BankSpec
    slots: list[int]
    experts: dict[str, Tensor]
    solved: dict[str, Tensor]


class ExpertBank(nn.Module):
    """Stored experts of one form, and the map from router slots to them.

    What is not overridden holds for whole experts that `spec.members` names.

    Attributes:
        spec: the plain data it was made from.
        layer: index of the decoder layer that it answers for.
        dims: sizes of the dense experts that it stands for.
        slots: int64 (number of router rows,), the row of the shell that answers each slot.
        shell: the family's module that computes in the end.
        is_stock: whether it is a view of experts that nobody replaced.
        wraps: whether it is put around whatever answers the layer, and stores no expert itself.
        whole: whether all that it stores are whole experts, each a row of fused tensors.
        watches: whether it wants `received`: set by a hook on the layer's attention before every
            forward, and used up by it.
        computes: whether its forward is its own, and not that of a module with whole experts.
        middles: where a list stands here, a forward of a bank that computes appends the middle
            activations (n, I) of each chosen stored expert, in ascending order.
        active: int64 (T,), the experts that were computed for each token of the last forward; None
            where they are always all that the router chose.
    """

    is_stock: ClassVar[bool] = False
    wraps: ClassVar[bool] = False
    whole: ClassVar[bool] = True

    slots: Tensor
    shell: nn.Module
    watches: bool = False
    received: tuple[Tensor, Tensor] | None = None
    middles: list[Tensor] | None = None
    active: Tensor | None = None

    def __init__(self, parts: BankParts):
        super().__init__()
        self.spec, self.layer = parts.spec, parts.layer
        self.dims = dims_of(parts.stock)._replace(experts=len(parts.slots))
        slots = torch.tensor(parts.slots, dtype=torch.int64, device=parts.like.device)
        self.register_buffer("slots", slots)

    @property
    def config(self) -> Any:
        return self.shell.config

    @property
    def num_experts(self) -> int:
        """Number of router slots that this bank answers."""
        return len(self.slots)

    @property
    def layout(self) -> Layout:
        return Layout.of(self.shell)

    @property
    def is_fused(self) -> bool:
        """Whether its experts can be read as fused tensors: the family is inside the seam."""
        return True

    @property
    def computes(self) -> bool:
        return False

    @property
    def uniform(self) -> int | None:
        """The width that all experts were narrowed to, where they were and it is one."""
        return None

    def nested(self) -> "list[ExpertBank]":
        """Return what answers the layer, innermost first, and the banks that wrap it."""
        return [self]

    def unwrapped(self) -> nn.Module:
        """Return the module that this one wraps; itself where it wraps none."""
        return self

    @classmethod
    def predicted(cls, spec: BankSpec, layer: int, dims: Dims) -> Stored:  # noqa: ARG003
        """Return what `stored` will be, from plain data alone."""
        return dict.fromkeys(spec.members, dims.expert)

    @classmethod
    def predicted_bits(cls, spec: BankSpec, layer: int, dims: Dims, width: int) -> Stored:
        """Return what `stored_bits` will be, from plain data alone."""
        return {key: n * width for key, n in cls.predicted(spec, layer, dims).items()}

    @classmethod
    def used(cls, spec: BankSpec, dims: Dims, stored: Stored) -> tuple[float, float]:  # noqa: ARG003
        """Return the numbers that every token reads, and those that each chosen expert adds."""
        return 0, dims.expert

    @classmethod
    def unchanged(cls, spec: BankSpec, layer: int) -> list[int | None]:
        """Return for each stored expert the one of the layer that it is as it was, or None."""
        alone = [len(g) == 1 and g[0][0] == layer and g[0][2] == 1.0 for g in spec.members]
        own = [g[0][1] if one else None for g, one in zip(spec.members, alone, strict=True)]
        return own or [None] * spec.stored

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:  # noqa: ARG004
        """Return the shape of every solved tensor by name; none by default."""
        return {}

    def dense(self) -> dict[str, Tensor]:
        """Return fused tensors whose leading axis `slots` indexes, under stock names."""
        return dict(expert_parameters(self.shell))

    def by_slot(self) -> dict[str, Tensor]:
        """Return fused tensors with one row for each router slot, under stock names."""
        return {name: tensor[self.slots] for name, tensor in self.dense().items()}

    def stack(self) -> ExpertWeights:
        """Return all experts in slot order: gate, up (E, I, H) and down (E, H, I)."""
        fused = self.by_slot()
        return self.layout.unpack(fused["gate_up_proj"], fused["down_proj"])

    def materialise(self, slot: int) -> ExpertWeights:
        """Return the expert that answers a router slot as (out, in) matrices."""
        dense, row = self.dense(), int(self.slots[slot])
        return self.layout.unpack(dense["gate_up_proj"][row], dense["down_proj"][row])

    def stored(self) -> Stored:
        """Return numbers by stored thing, counted from tensors; equal keys are the same thing."""
        each = sum(tensor[0].numel() for tensor in self.dense().values())
        return dict.fromkeys(self.spec.members, each)

    def stored_bits(self, width: int) -> Stored:
        """Return the bits of each stored thing, where a dense number takes `width` of them."""
        return {key: n * width for key, n in self.stored().items()}

    def numbers_used(self, chosen: float) -> float:
        """Return the numbers read for a token that `chosen` experts answer, by the tensors."""
        shared, each = self.used(self.spec, self.dims, self.stored())
        return shared + chosen * each

    def check_plain(self) -> None:
        """Check that plain experts can compute what this form computes; reads no weight.

        Raises:
            InputError: they cannot.
        """

    def as_stock(self, width: int | None = None) -> nn.Module:
        """Return a plain experts module with one whole expert for each router slot.

        Args:
            width: channels of each expert, `uniform` or more of them; None for all I.

        Raises:
            InputError: as `check_plain`.
        """
        rows = {name: tensor.detach() for name, tensor in self.by_slot().items()}
        return shell_of(self.shell, rows, len(self.slots))

    def solved_tensors(self) -> dict[str, Tensor]:
        """Return the solved tensors, Parameters or buffers, by their names in the plan."""
        names = self.shapes(self.spec, self.dims)
        return {name: getattr(self, name.replace(".", "_")).detach() for name in names}

    def stored_form(self) -> StoredForm:
        """Return what a checkpoint holds of this bank alone, without what it wraps."""
        experts = {name: p.detach() for name, p in expert_parameters(self.shell).items()}
        return StoredForm(self.spec, self.slots.tolist(), experts, self.solved_tensors())

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return cast(Tensor, self.shell(hidden, self.slots[index], weights))


class StockExperts(ExpertBank):
    """The family's own experts seen as a bank, so that nothing need ask whether they were replaced.

    It is a view, made when it is asked for: no model contains one, and making it reads nothing.
    """

    is_stock = True

    def __init__(self, experts: nn.Module, layer: int):
        nn.Module.__init__(self)  # sizes and slots are read off the experts when they are asked for
        self.shell, self.layer = experts, layer

    @property
    def spec(self) -> BankSpec:  # type: ignore[override]
        count = self.num_experts
        return BankSpec("dense", count, tuple(((self.layer, e, 1.0),) for e in range(count)))

    @property
    def dims(self) -> Dims:  # type: ignore[override]
        return dims_of(self.shell)

    @property
    def slots(self) -> Tensor:  # type: ignore[override]
        device = next(iter(expert_parameters(self.shell).values())).device
        return torch.arange(self.num_experts, device=device)

    @property
    def num_experts(self) -> int:
        return cast(int, self.shell.num_experts)

    @property
    def is_fused(self) -> bool:
        parts = [getattr(self.shell, name, None) for name in ("gate_up_proj", "down_proj")]
        return all(isinstance(part, Tensor) and part.dim() == 3 for part in parts)

    def unwrapped(self) -> nn.Module:
        return self.shell

    def by_slot(self) -> dict[str, Tensor]:
        return self.dense()  # the experts' own tensors: nothing is copied

    def as_stock(self, width: int | None = None) -> nn.Module:
        return self.shell

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return cast(Tensor, self.shell(hidden, index, weights))


def bank_of(experts: nn.Module, layer: int = 0) -> ExpertBank:
    """Return what a block's `experts` are as a bank.

    Args:
        experts: a bank, or a family's own module.
        layer: index of the decoder layer, for the names of what a family's own module stores.
    """
    return experts if isinstance(experts, ExpertBank) else StockExperts(experts, layer)


def bank_class(kind: str) -> type[ExpertBank]:
    """Return the class of a kind: the one bank that its module below `rerail.experts` defines.

    Raises:
        InputError: there is no such module.
    """
    modules = pkgutil.iter_modules(rerail.experts.__path__)
    known = sorted({m.name for m in modules} - {"base", "encoded"})
    if kind not in known:
        raise InputError(f"bank kind {kind!r} is not known; allowed: {known}")
    module = importlib.import_module(f"rerail.experts.{kind}")
    # what the module imports (ExpertBank itself) does not count
    own = [c for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__]
    [bank] = [c for c in own if isinstance(c, type) and issubclass(c, ExpertBank)]
    return bank


def build_bank(
    spec: BankSpec,
    slots: Sequence[int],
    layer: int,
    stocks: Mapping[int, nn.Module],
    tensors: Mapping[str, Tensor],
) -> ExpertBank:
    """Build the bank that a spec names, from what `BankParts` describes.

    Raises:
        InputError: the kind is not known.
    """
    return bank_class(spec.kind)(BankParts(spec, slots, layer, stocks, tensors))
