"""Banks: the modules that stand in for `experts` and hold their stored weights.

A bank has the signature of a transformers experts module,
`(hidden (T, H), index (T, K), weights (T, K)) -> (T, H)`, and lets the family's own module compute:
it points a shallow copy of that module (the *shell*) at the weights that it stores. So activation,
clamps, biases and the chosen experts implementation are always the model's own.
"""

import copy
import importlib
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ExpertWeights(NamedTuple):
    """Experts as (out, in) matrices, whatever the family's layout: one expert, or a stack with a leading axis."""

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Layout:
    """How a family fuses its expert tensors."""

    transposed: bool = False
    concatenated: bool = True

    @classmethod
    def of(cls, experts: nn.Module) -> "Layout":
        """Read the layout from the flags that transformers puts on every experts module."""
        transposed = bool(getattr(experts, "is_transposed", False))
        return cls(transposed, bool(getattr(experts, "is_concatenated", True)))

    def unpack(self, gate_up: Tensor, down: Tensor) -> ExpertWeights:
        """Split fused tensors (..., 2I, H) and (..., H, I) into gate, up (..., I, H) and down."""
        if self.transposed:
            gate_up, down = gate_up.mT, down.mT
        if self.concatenated:
            gate, up = gate_up.chunk(2, dim=-2)
        else:
            gate, up = gate_up[..., ::2, :], gate_up[..., 1::2, :]
        return ExpertWeights(gate, up, down)

    def pack(self, weights: ExpertWeights) -> dict[str, Tensor]:
        """Fuse again: the inverse of `unpack`, keyed by transformers' parameter names."""
        gate, up, down = weights
        if self.concatenated:
            gate_up = torch.cat([gate, up], dim=-2)
        else:
            gate_up = torch.stack([gate, up], dim=-2).flatten(-3, -2)
        if self.transposed:
            gate_up, down = gate_up.mT, down.mT
        return {"gate_up_proj": gate_up.contiguous(), "down_proj": down.contiguous()}


@dataclass(frozen=True)
class BankSpec:
    """Plain data that says in which form a layer's experts are stored.

    Attributes:
        kind: a module name below `rerail.moe.banks`, or `dense`.
        stored: number of stored experts P.
        members: for each stored expert, the (expert, weight) pairs whose weighted sum it is; a
            single pair of weight 1 means the teacher's own tensors. Empty for other forms.
        integers: sizes of the form (ranks, bases, ...).
        options: words of the form (activation, matrices, ...).
        tensors: names of the solved tensors in the plan's safetensors file.
    """

    kind: str = "dense"
    stored: int = 0
    members: tuple[tuple[tuple[int, float], ...], ...] = ()
    integers: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()


def expert_parameters(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Return the fused parameters of a stock experts module: those with a leading expert axis."""
    count = int(experts.num_experts)  # type: ignore[arg-type]
    return {n: p for n, p in experts.named_parameters(recurse=False) if p.shape[0] == count}


def shell_of(experts: nn.Module, parameters: Mapping[str, Tensor], count: int) -> nn.Module:
    """Return a shallow copy of a stock experts module that reads other tensors.

    Parameter objects stay the objects they are, so what is shared with a teacher stays shared.
    """
    shell = copy.copy(experts)
    shell._parameters = dict(experts._parameters)
    for name, tensor in parameters.items():
        held = isinstance(tensor, nn.Parameter)
        shell._parameters[name] = tensor if held else nn.Parameter(tensor, requires_grad=False)  # type: ignore[assignment]
    shell.num_experts = count  # type: ignore[assignment]
    return shell


class ExpertBank(nn.Module):
    """Stored experts of one form, and the map from router slots to them.

    Attributes:
        spec: the plain data it was made from.
        slots: int64 (number of router rows,), the stored expert that answers each slot.
    """

    slots: Tensor
    shell: nn.Module

    def __init__(self, spec: BankSpec, slots: Sequence[int], device: torch.device | None = None):
        super().__init__()
        self.spec = spec
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

    @abstractmethod
    def dense(self) -> dict[str, Tensor]:
        """Return the stored experts as fused tensors with leading axis P, under stock names."""

    @abstractmethod
    def stored_parameters(self) -> int:
        """Return how many numbers an export of this bank writes, counted from its tensors."""

    def stored_bytes(self, itemsize: int) -> int:
        """Return the bytes an export writes at `itemsize` bytes a number."""
        return self.stored_parameters() * itemsize

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
        out: Tensor = self.shell(hidden, self.slots[index], weights)
        return out


class DenseBank(ExpertBank):
    """Whole experts: a subset of the teacher's (slice, mask, alias), or weighted sums of them (merge).

    Where every stored expert is one of the teacher's, the bank reads the teacher's own Parameters
    through its slot map and no weight is copied; `stored_parameters` counts what an export writes.
    """

    def __init__(self, spec: BankSpec, slots: Sequence[int], experts: nn.Module):
        singles = all(len(m) == 1 and m[0][1] == 1.0 for m in spec.members)
        held = expert_parameters(experts)
        chosen = [spec.members[s][0][0] for s in slots] if singles else list(slots)
        super().__init__(spec, chosen, next(iter(held.values())).device)
        self._shared = singles
        if singles:
            self.shell = shell_of(experts, held, int(experts.num_experts))  # type: ignore[arg-type]
        else:
            merged = {name: _combine(p, spec.members) for name, p in held.items()}
            self.shell = shell_of(experts, merged, spec.stored)

    def dense(self) -> dict[str, Tensor]:
        """Return the tensors that the shell reads; the leading axis is the teacher's E when shared."""
        return dict(expert_parameters(self.shell))

    def stored_parameters(self) -> int:
        """Count the stored experts that are read, biases included."""
        return sum(p[0].numel() for p in self.dense().values()) * self.spec.stored


def _combine(stack: Tensor, members: tuple[tuple[tuple[int, float], ...], ...]) -> Tensor:
    """Return sum_e weight_e W_e for each stored expert, in float32 or wider, cast once."""
    wide = torch.promote_types(stack.dtype, torch.float32)
    merged = torch.empty((len(members), *stack.shape[1:]), dtype=stack.dtype, device=stack.device)
    for row, group in enumerate(members):
        if len(group) == 1 and group[0][1] == 1.0:
            merged[row] = stack.detach()[group[0][0]]
            continue
        total = torch.zeros(stack.shape[1:], dtype=wide, device=stack.device)
        for expert, weight in group:
            total += weight * stack.detach()[expert].to(wide)
        merged[row] = total.to(stack.dtype)
    return merged


class SolvedBank(ExpertBank):
    """Experts given by solved tensors (factors, bases, ...): a subclass says how they expand.

    With `run: materialised` the expanded experts are kept in memory (they are frozen, and expanding
    is exact up to rounding); with `run: lazy` every forward expands them anew.
    """

    def __init__(
        self,
        spec: BankSpec,
        slots: Sequence[int],
        experts: nn.Module,
        tensors: Mapping[str, Tensor],
    ):
        held = expert_parameters(experts)
        super().__init__(spec, slots, next(iter(held.values())).device)
        self._names = {name: name.replace(".", "_") for name in tensors}
        for name, tensor in tensors.items():
            self.register_parameter(self._names[name], nn.Parameter(tensor, requires_grad=False))
        self.shell = shell_of(experts, {}, spec.stored)
        self._stock = {n: p for n, p in held.items() if n in self.untouched()}
        if spec.options.get("run", "materialised") == "materialised":
            self.shell = shell_of(experts, self.dense(), spec.stored)

    @abstractmethod
    def untouched(self) -> set[str]:
        """Return the stock parameter names that stay the teacher's own."""

    @abstractmethod
    def expand(self) -> dict[str, Tensor]:
        """Return the other stock tensors from the solved ones."""

    def solved(self, name: str) -> Tensor:
        """Return a solved tensor by its name in the plan."""
        return self.get_parameter(self._names[name])

    def dense(self) -> dict[str, Tensor]:
        """Return the fused tensors with leading axis P."""
        with torch.no_grad():
            return {**self._stock, **self.expand()}

    def stored_parameters(self) -> int:
        """Count the solved tensors and what stays dense."""
        solved = sum(self.solved(name).numel() for name in self._names)
        return solved + sum(p.numel() for p in self._stock.values())

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Answer router slots `index` (T, K) by the stored experts."""
        if self.spec.options.get("run", "materialised") == "materialised":
            return super().forward(hidden, index, weights)
        arguments = (hidden, self.slots[index], weights)
        out: Tensor = torch.func.functional_call(self.shell, self.dense(), arguments)
        return out


def build_bank(
    spec: BankSpec, slots: Sequence[int], experts: nn.Module, tensors: Mapping[str, Tensor]
) -> ExpertBank:
    """Build the bank that a spec names; kinds are module names below `rerail.moe.banks`, nothing else.

    Raises:
        ValueError: the kind is not a module name there.
    """
    if isinstance(experts, ExpertBank):
        experts = experts.as_stock()
    if spec.kind == "dense":
        return DenseBank(spec, slots, experts)
    if not re.fullmatch(r"[a-z_]+", spec.kind):
        raise ValueError(f"bank kind {spec.kind!r} is not a module name of rerail.moe.banks")
    bank: type[SolvedBank] = importlib.import_module(f"rerail.moe.banks.{spec.kind}").Bank
    return bank(spec, slots, experts, tensors)
