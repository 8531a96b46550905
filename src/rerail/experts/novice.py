"""Novice form: kept experts, and one constant vector N_e (H,) in the place of each other one.

A token that chooses a novice gets g_e(x) N_e; router, choice and gate weights are as they were.
"""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from rerail.errors import InputError
from rerail.experts.base import BankParts, BankSpec, ExpertBank, Stored, StoredForm
from rerail.moe.fused_experts import Dims, ExpertWeights, expert_parameters, live_sum, shell_of

_BIAS = "down_proj_bias"


class NoviceExperts(ExpertBank):
    """Reads kept experts from the layer's own Parameters; `slots` of novices begin at E.

    The first len(kept) of `spec.stored` are experts (`spec.integers["kept"]`, their numbers in the
    layer), the others novices. Solved tensor: `novices` (stored - len(kept), H).
    """

    whole = False

    def __init__(self, parts: BankParts):
        kept, own = parts.spec.each("kept"), cast(int, parts.stock.num_experts)
        rows = [kept[s] if s < len(kept) else own + s - len(kept) for s in parts.slots]
        super().__init__(parts._replace(slots=rows))
        self.shell = shell_of(parts.stock, {}, own)
        novices = parts.tensors["novices"].detach().to(parts.like)
        self.novices = nn.Parameter(novices, requires_grad=False)

    @classmethod
    def unchanged(cls, spec: BankSpec, layer: int) -> list[int | None]:  # noqa: ARG003
        kept = spec.each("kept")
        return [*kept, *[None] * (spec.stored - len(kept))]

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        """Return the shape of the novices.

        Raises:
            InputError: `kept` names experts that the layer does not have.
        """
        kept = spec.each("kept")
        fits = 1 <= len(kept) <= spec.stored and 0 <= min(kept) <= max(kept) < dims.experts
        if not fits or list(kept) != sorted(set(kept)):
            raise InputError(
                f"a novice bank of {spec.stored} keeps the experts {list(kept)}; they must be "
                f"distinct, ascending and below {dims.experts}, and at least one"
            )
        return {"novices": (spec.stored - len(kept), dims.hidden)}

    @classmethod
    def predicted(cls, spec: BankSpec, layer: int, dims: Dims) -> Stored:
        kept: Stored = {((layer, e, 1.0),): dims.expert for e in spec.each("kept")}
        return kept | {(layer, "novices"): (spec.stored - len(spec.each("kept"))) * dims.hidden}

    def stored(self) -> Stored:
        each = sum(p[0].numel() for p in expert_parameters(self.shell).values())
        kept: Stored = {((self.layer, e, 1.0),): each for e in self.spec.each("kept")}
        return kept | {(self.layer, "novices"): self.novices.numel()}

    def check_plain(self) -> None:
        """Check that experts have biases, which can return a constant.

        Raises:
            InputError: they have none.
        """
        if _BIAS not in self.dims.numbers and len(self.novices):
            raise InputError(
                f"layer {self.layer} answers {len(self.novices)} slots by constants (novices), and "
                "an expert of this family has no bias to hold one: the form has no plain experts; "
                "use export.form=package or remote, without densify"
            )

    def dense(self) -> dict[str, Tensor]:
        """Return the layer's E experts, then novices: zero weights, and the constant as down bias.

        Raises:
            InputError: as `check_plain`.
        """
        self.check_plain()
        dense = {}
        for name, tensor in expert_parameters(self.shell).items():
            # with down = 0 an expert answers its down bias, whatever the token
            zeros = tensor.new_zeros(len(self.novices), *tensor.shape[1:])
            dense[name] = torch.cat([tensor, self.novices if name == _BIAS else zeros])
        return dense

    def materialise(self, slot: int) -> ExpertWeights:
        """Return a kept expert's matrices; a novice has none, unless a bias holds its constant."""
        row, own = int(self.slots[slot]), expert_parameters(self.shell)
        if row >= len(own["down_proj"]):
            return super().materialise(slot)
        return self.layout.unpack(own["gate_up_proj"][row], own["down_proj"][row])

    def stored_form(self) -> StoredForm:
        """Return the kept experts alone, which are then the first of the layer, and novices."""
        form, kept = super().stored_form(), list(self.spec.each("kept"))
        own = cast(int, self.shell.num_experts)
        place = {row: i for i, row in enumerate(kept)}
        slots = [place[row] if row < own else row - own + len(kept) for row in form.slots]
        spec = replace(form.spec, integers={**form.spec.integers, "kept": tuple(range(len(kept)))})
        experts = {name: tensor[kept] for name, tensor in form.experts.items()}
        return form._replace(spec=spec, slots=slots, experts=experts)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Add kept experts and gated constants up; a novice costs no expert."""
        rows, own = self.slots[index], cast(int, self.shell.num_experts)
        live = rows < own
        self.active = live.sum(dim=1)
        out = live_sum(self.shell, hidden, rows, weights, live)
        if not len(self.novices) or bool(live.all()):
            return out
        # several choices of a token may be novices: their gate weights, by novice
        share = weights.new_zeros(len(index), len(self.novices))
        share = share.scatter_add(1, (rows - own).clamp(min=0), weights.masked_fill(live, 0))
        return out + (share @ self.novices.to(share.dtype)).to(out.dtype)
