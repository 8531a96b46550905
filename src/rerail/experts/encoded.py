"""Experts stored as other tensors (factors, bases, codes) that are what runs."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rerail.experts.base import BankParts, BankSpec, ExpertBank, Stored, StoredForm
from rerail.moe.families import middle_of, norm_after
from rerail.moe.fused_experts import (
    Dims,
    ExpertWeights,
    decoded_product,
    expert_parameters,
    routed_sum,
    shell_of,
)


class EncodedExperts(ExpertBank):
    """Experts stored as other tensors (factors, bases, codes), and computed from just these.

    A form says by `shapes` what is stored and by `matrix` how an expert's matrix follows from it.
    With no more than that a forward decodes the chosen experts one at a time. A form of factors
    also says by `product` how to multiply by a matrix without making it, by `shared` what all
    experts need of their inputs, and by `finish` what all of them do to their outputs.

    Option `run`: `stored` (the default, not written) as above, or `materialised`, where the whole
    experts are made once and stay in memory beside the stored tensors, for the family's own
    kernels. A compressed model is made to be small, and over the tokens of a prompt factors are
    faster than what they stand for and decoding costs less than a third; but where every token is a
    forward of its own, as in generation, a decoded matrix serves one product: who has the memory of
    the whole experts generates several times faster with `materialised` (quantised, basis).

    Solved tensors are stored in the dtype of the experts that they replace.

    Attributes:
        ready: what `prepared` made for the experts that are being computed.
    """

    whole = False

    def __init__(self, parts: BankParts):
        super().__init__(parts)
        self.ready: dict[tuple[str, int], Tensor] = {}
        spec, like = parts.spec, parts.like
        for name, tensor in parts.tensors.items():
            solved = nn.Parameter(self.cast(tensor.detach(), like), requires_grad=False)
            self.register_parameter(name.replace(".", "_"), solved)
        fused = expert_parameters(parts.stock)
        self._untouched = tuple(n for n in fused if n not in self.touched(spec))
        self.shell = shell_of(parts.stock, {}, spec.stored)
        for name in self.touched(spec):
            del self.shell._parameters[name]  # so that the replaced weights can be let go
        if self.materialised:
            self.shell = shell_of(self.shell, self.running(), spec.stored)

    @staticmethod
    def cast(tensor: Tensor, like: Tensor) -> Tensor:
        """Return a solved tensor on the device of the experts; numbers take their dtype too."""
        return tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device)

    @property
    def materialised(self) -> bool:
        """Whether whole experts are in memory."""
        return self.spec.options.get("run", "stored") == "materialised"

    @property
    def computes(self) -> bool:
        return not self.materialised

    @staticmethod
    def touched(spec: BankSpec) -> frozenset[str]:  # noqa: ARG004
        """Return the stock parameter names that solved tensors replace; the others stay."""
        return frozenset({"gate_up_proj", "down_proj"})

    # ---- what a form says

    @abstractmethod
    def matrix(self, name: str, expert: int) -> Tensor:
        """Return `gate`, `up` (I, H) or `down` (H, I) of a stored expert, from the solved tensors.

        It is asked only for what `touched` replaces.
        """

    def product(self, name: str, expert: int, x: Tensor, shared: Tensor | None) -> Tensor | None:
        """Return x W^T (n, out) for the named matrix of a stored expert, without making W.

        `down` may return (n, S) of which `finish` makes outputs; gate and up may return fewer
        channels than I where `down` takes as many.

        Args:
            name: `gate`, `up` or `down`.
            expert: the stored expert.
            x: (n, in) inputs: hidden states, or middle activations for `down`.
            shared: (n, s) of `shared(name, ...)` for these inputs; None for `down`.

        Returns:
            the product, or None (the default) where decoding `matrix` is the better way.
        """
        return None

    def shared(self, name: str, hidden: Tensor) -> Tensor | None:
        """Return what all experts need of hidden states (T, H) for gate or up: (T, s) or None.

        It is computed once in a forward: the product with factors that experts share.
        """
        return None

    def finish(self, total: Tensor) -> Tensor:
        """Return outputs (T, H) of what `down` returned (T, S): a linear map that experts share.

        It is applied once, to the gated sum, where neither a bias nor a norm comes between.
        """
        return total

    def prepared(self, experts: Sequence[int]) -> dict[tuple[str, int], Tensor]:
        """Return what the next few chosen experts need and is better made together; by default {}.

        It stands in `ready`, by matrix and expert, while these experts are computed and no longer;
        in a backward pass nothing is ready.
        """
        return {}

    # ---- what follows

    def decoded(self, name: str, expert: int) -> Tensor:
        """Return a matrix (out, in) of a stored expert, from solved tensors or the stock's own."""
        stock = "down_proj" if name == "down" else "gate_up_proj"
        if stock in self.touched(self.spec):
            return self.matrix(name, expert)
        own = self.shell.get_parameter(stock)[expert]
        matrix: Tensor = getattr(self.layout.unpack(own, own), name)
        return matrix

    def expand(self) -> dict[str, Tensor]:
        """Return the touched stock tensors, with leading axis P, from the solved ones."""
        stacks = (
            torch.stack([self.decoded(name, e) for e in range(self.spec.stored)])
            for name in self.dims.matrices
        )
        packed = self.layout.pack(ExpertWeights(*stacks))
        return {name: packed[name] for name in packed if name in self.touched(self.spec)}

    def untouched(self) -> dict[str, Tensor]:
        """Return the stock tensors that no solved ones replace."""
        return {name: self.shell.get_parameter(name) for name in self._untouched}

    def solved(self, name: str) -> Tensor:
        """Return a solved tensor by its name in the plan."""
        return self.get_parameter(name.replace(".", "_"))

    def dense(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {**self.untouched(), **self.expand()}

    def materialise(self, slot: int) -> ExpertWeights:
        row = int(self.slots[slot])
        return ExpertWeights(*(self.decoded(name, row) for name in self.dims.matrices))

    def running(self) -> dict[str, Tensor]:
        """Return the fused tensors that forwards use where whole experts are in memory."""
        return self.dense()

    @classmethod
    def predicted(cls, spec: BankSpec, layer: int, dims: Dims) -> Stored:
        solved = {n: math.prod(shape) for n, shape in cls.shapes(spec, dims).items()}
        dense = {n: c * dims.experts for n, c in dims.numbers.items() if n not in cls.touched(spec)}
        return {(layer, n): count for n, count in {**solved, **dense}.items()}

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
        tensors = {**self.solved_tensors(), **self.untouched()}
        return {(self.layer, name): tensor.numel() for name, tensor in tensors.items()}

    def stored_form(self) -> StoredForm:
        """Return the solved tensors and what is dense."""
        form = super().stored_form()
        # a reader has no whole experts yet, and would make them of empty tensors
        options = {name: word for name, word in form.spec.options.items() if name != "run"}
        experts = {name: tensor.detach() for name, tensor in self.untouched().items()}
        return form._replace(spec=replace(form.spec, options=options), experts=experts)

    # ---- the forward

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = self.slots[index]
        if self.materialised or not len(hidden):
            return cast(Tensor, self.shell(hidden, rows, weights)) if len(hidden) else hidden
        shared = {name: self.shared(name, hidden) for name in ("gate", "up")}
        bias, norm = self.shell._parameters.get("down_proj_bias"), norm_after(self.shell)

        def answer(expert: int, tokens: Tensor) -> Tensor:
            gate_up = self._gate_up(
                expert,
                hidden[tokens],
                {n: s if s is None else s[tokens] for n, s in shared.items()},
            )
            middle = middle_of(self.shell, gate_up)
            if self.middles is not None:
                self.middles.append(self.spread(middle))
            out = self._down(expert, middle)
            if bias is not None or norm is not None:
                out = self.finish(out)
            out = out if bias is None else out + bias[expert]
            return out if norm is None else norm(out)

        total = routed_sum(self.shell, rows, weights, answer, self._prepare)
        return total if bias is not None or norm is not None else self.finish(total)

    def _prepare(self, experts: Sequence[int]) -> None:
        with torch.no_grad():
            self.ready = self.prepared(experts) if experts else {}

    def _gate_up(self, expert: int, x: Tensor, shared: Mapping[str, Tensor | None]) -> Tensor:
        """Return gate and up outputs (n, 2I) of inputs (n, H), as the family orders them."""
        parts = [self.product(name, expert, x, shared[name]) for name in ("gate", "up")]
        if parts[0] is None or parts[1] is None:
            out = decoded_product(x, lambda: self._fused(expert))
        else:
            out = self.layout.join(parts[0], parts[1])
        bias = self.middle_bias(expert)
        return out if bias is None else out + bias

    def _down(self, expert: int, x: Tensor) -> Tensor:
        out = self.product("down", expert, x, None)
        if out is None:
            return decoded_product(x, lambda: self.decoded("down", expert))
        return out

    def _fused(self, expert: int) -> Tensor:
        """Return the rows of gate and up (2I, H) as the family orders them."""
        gate, up = self.decoded("gate", expert), self.decoded("up", expert)
        return self.layout.join(gate, up, dim=-2)

    def spread(self, middle: Tensor) -> Tensor:
        """Return middle activations of all I channels; those beyond the stored ones are 0."""
        return F.pad(middle, (0, self.dims.intermediate - middle.shape[1]))

    def middle_bias(self, expert: int) -> Tensor | None:
        """Return the bias (2I,) of gate and up as the family orders them; None for none."""
        bias = self.shell._parameters.get("gate_up_proj_bias")
        return None if bias is None else bias[expert]
