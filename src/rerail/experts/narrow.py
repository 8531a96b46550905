"""Narrow form: each expert keeps some of its I channels.

Channel j of an expert is row j of gate, row j of up (their biases with them) and column j of down.
With widths w_e and S = sum_e w_e, the kept channels of all experts lie one below the other: gate,
up, down (S, H) (down as its columns), gate_bias and up_bias (S,) where the family has them.

To run, experts are padded to one width with zeros. Zeros are exact: the down column is zero, and
act(0) * up is finite in every family (gpt_oss: (0 + 1) * 0).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rerail.experts.base import BankSpec
from rerail.experts.encoded import EncodedExperts
from rerail.moe.fused_experts import Dims, ExpertWeights, shell_of


class NarrowExperts(EncodedExperts):
    """Integers: `widths`, one for each expert; option `biases`: `gate+up` where there are some."""

    @staticmethod
    def touched(spec: BankSpec) -> frozenset[str]:
        """The bias of down stays: it has no channels."""
        biases = {"gate_up_proj_bias"} if "biases" in spec.options else set()
        return frozenset({"gate_up_proj", "down_proj"} | biases)

    @staticmethod
    def shapes(spec: BankSpec, dims: Dims) -> dict[str, tuple[int, ...]]:
        total = sum(spec.each("widths"))
        biases = ("gate_bias", "up_bias") if "gate_up_proj_bias" in dims.numbers else ()
        matrices = dict.fromkeys(("gate", "up", "down"), (total, dims.hidden))
        return {**matrices, **dict.fromkeys(biases, (total,))}

    @property
    def uniform(self) -> int | None:
        widths = set(self.spec.each("widths"))
        return widths.pop() if len(widths) == 1 else None

    def matrix(self, name: str, expert: int) -> Tensor:
        rows = self._rows(name, expert)
        padded = F.pad(rows, (0, 0, 0, self.dims.intermediate - len(rows)))
        return padded.mT if name == "down" else padded

    def product(self, name: str, expert: int, x: Tensor, shared: Tensor | None) -> Tensor:
        rows = self._rows(name, expert)
        return x @ rows if name == "down" else F.linear(x, rows)

    def middle_bias(self, expert: int) -> Tensor | None:
        if "gate_up_proj_bias" not in self.touched(self.spec):
            return None
        return self.layout.join(self._rows("gate_bias", expert), self._rows("up_bias", expert))

    def _rows(self, name: str, expert: int) -> Tensor:
        """Return the kept channels of an expert."""
        widths = self.spec.each("widths")
        return self.solved(name)[sum(widths[:expert]) : sum(widths[: expert + 1])]

    def expand(self) -> dict[str, Tensor]:
        return self.fused(self.dims.intermediate)

    def running(self) -> dict[str, Tensor]:
        """Return experts of the largest width, in whole runs of 16 bytes as kernels ask."""
        step = 16 // self.solved("gate").element_size()
        width = max(1, -(-max(self.spec.each("widths")) // step)) * step
        return self._of_width(min(width, self.dims.intermediate))

    def _of_width(self, width: int) -> dict[str, Tensor]:
        with torch.no_grad():
            return {**self.untouched(), **self.fused(width)}

    def fused(self, width: int) -> dict[str, Tensor]:
        """Return the touched stock tensors, every expert padded with zeros to one width."""
        widths = torch.tensor(self.spec.each("widths"), device=self.slots.device)
        # (P, width), true for real channels: in this order the solved tensors have their rows
        filled = torch.arange(width, device=widths.device) < widths.unsqueeze(1)
        gate, up, down = (self._padded(name, filled) for name in ("gate", "up", "down"))
        packed = self.layout.pack(ExpertWeights(gate, up, down.mT))
        if "gate_up_proj_bias" in self.touched(self.spec):
            gate, up = (self._padded(n, filled) for n in ("gate_bias", "up_bias"))
            packed["gate_up_proj_bias"] = self.layout.join(gate, up)
        return packed

    def as_stock(self, width: int | None = None) -> nn.Module:
        """Return a plain experts module, as `ExpertBank.as_stock`, also of a smaller width."""
        if width is None:
            return super().as_stock()
        rows = {name: tensor.detach()[self.slots] for name, tensor in self._of_width(width).items()}
        return shell_of(self.shell, rows, len(self.slots))

    def _padded(self, name: str, filled: Tensor) -> Tensor:
        solved = self.solved(name)
        out = solved.new_zeros(*filled.shape, *solved.shape[1:])
        out[filled] = solved
        return out
