"""GPTQ for every expert (arXiv 2210.17323): columns in order, errors moved to those still to come.

For W (out, in) with inputs x of second moment H = sum x x^T (in, in) over the tokens routed to the
expert (gate and up share it; the inputs of down are act(gate) * up), with U upper triangular,
U^T U = (H + damp I)^-1:

    q_i = Q(w_i),   e = (w_i - q_i) / U_ii,   w_j -= e U_ij for j > i.

H is divided by the mean of its live diagonal, so that damp = `percdamp` is relative to it. A dead
input (H_ii = 0) gets H_ii = 1 and its column becomes 0. The grid Q (see `rounding.grid`) of a
group of G columns is fitted on the updated weights when its first column is reached. Updates reach
the end of a block of about 128 columns at once and the later ones after the block, which changes
nothing. H ~ I gives round to nearest.

Few tokens (specification of MC, 6.1): an expert with fewer than 4 * in gets `scarce` more damping,
one with fewer than `least` has no H worth using and is rounded to nearest; both are in the plan's
notes. Where damping is too small for H to be inverted it grows tenfold until it is not.

Paper and code: MC's code (arXiv 2410.06270) leaves out the updates inside a block for b <= 3
(`inner=blocks`); that costs output error, so all updates is the default. Its search over shrunken
scales dequantises twice where packing is off, and is not offered; neither is ordering by activity.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rerail.compress.solvers.rounding import coded, grid, inverse_root, round_in_turn
from rerail.compress.templates.quantiser import MomentsOf, Quantiser, by_classes
from rerail.experts.quantized import Coded
from rerail.moe.model import MoELayer
from rerail.statistics.moments import InputMoment, MiddleMoment
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, Statistic
from rerail.transfer import moved


@dataclass(frozen=True, kw_only=True)
class GPTQ(Quantiser):
    """Rounds column by column and moves each error to the columns still to come.

    Attributes:
        percdamp: damping, relative to the mean diagonal.
        inner: `full`, or `blocks` for no updates inside a block at up to three bits.
        scarce: further damping of experts with fewer than 4 * in tokens.
        least: fewest tokens of an expert that is not just rounded to nearest.
    """

    percdamp: float = 0.01
    inner: Literal["full", "blocks"] = "full"
    scarce: float = 0.09
    least: int = 1

    paper: ClassVar[str] = "arXiv 2210.17323"

    @property
    def requires(self) -> tuple[Statistic, ...]:
        return (Count(), InputMoment(), MiddleMoment())

    def moments(self, layer: MoELayer, statistics: LayerStatistics) -> Mapping[str, MomentsOf]:
        """Return H by matrix, damped where tokens are few and zero where there are too few."""
        count, device = statistics[Count()], layer.router_rows.device

        def damped(sums: Tensor, experts: Tensor) -> Tensor:
            moment, tokens = moved(sums[experts], device), count[experts].to(device)
            mean = moment.diagonal(dim1=1, dim2=2).mean(dim=1)
            more = self.scarce * mean * (tokens < 4 * moment.shape[1]).to(mean)
            eye = torch.eye(moment.shape[1], dtype=moment.dtype, device=device)
            usable = (tokens >= self.least).to(mean).view(-1, 1, 1)
            return (moment + more.view(-1, 1, 1) * eye) * usable

        inputs = partial(damped, statistics[InputMoment()])
        return {"gate": inputs, "up": inputs, "down": partial(damped, statistics[MiddleMoment()])}

    def remarks(self, layer: MoELayer, statistics: LayerStatistics) -> tuple[str, ...]:
        """Name the experts that had too few tokens."""
        count, need = statistics[Count()], 4 * max(layer.hidden_size, layer.intermediate_size)
        few = (count < max(1, self.least)).nonzero().flatten().tolist()
        scarce = [e for e in (count < need).nonzero().flatten().tolist() if e not in few]
        remarks = (
            (few, f"{max(1, self.least)} calibration tokens and were rounded to nearest"),
            (scarce, f"{need} calibration tokens and were damped more"),
        )
        return tuple(f"experts {which} had fewer than {what}" for which, what in remarks if which)

    def encode_rows(
        self, rows: Tensor, moment: Tensor | None, widths: Mapping[int, int]
    ) -> dict[int, Coded]:
        """Quantise the rows of all classes with one root."""
        assert moment is not None
        root, dead = inverse_root(moment.unsqueeze(0), self.percdamp)
        return by_classes(rows, widths, lambda own, bits: self.in_order(own, root, dead, bits))

    def encode_columns(
        self, columns: Tensor, moment: Tensor | None, widths: Mapping[int, int]
    ) -> dict[int, Coded]:
        """Quantise columns in the order of their classes, each on a grid of its own."""
        assert moment is not None
        root, dead = inverse_root(moment.unsqueeze(0), self.percdamp)
        each = [bits for bits, width in widths.items() for _ in range(width)]
        live = columns.float().masked_fill(dead, 0)
        return round_in_turn(live, root[0], each, self.group, columns.dtype)

    def encode(self, stack: Tensor, moment: Tensor | None, bits: int) -> Coded:
        assert moment is not None
        root, dead = inverse_root(moment, self.percdamp)
        return self.in_order(stack, root, dead, bits)

    def in_order(self, stack: Tensor, root: Tensor, dead: Tensor, bits: int) -> Coded:
        """Quantise the columns of (n, out, in) in order, held as rows (n, in, out)."""
        w = stack.float().masked_fill(dead.unsqueeze(1), 0).mT.contiguous()
        width, within = w.shape[1], self.inner == "full" or bits > 3
        codes, scales, zeros = torch.empty_like(w), [], []
        block = self.group * max(1, 128 // self.group)
        for start in range(0, width, block):
            end = min(start + block, width)
            errors = torch.zeros_like(w[:, start:end])
            for i in range(start, end):
                if i % self.group == 0:
                    piece = w[:, i : min(i + self.group, end)].mT.contiguous()
                    scale, zero = (t.mT for t in grid(piece, bits, stack.dtype))
                    scales.append(scale)
                    zeros.append(zero)
                column = w[:, i : i + 1]
                codes[:, i : i + 1] = code = coded(column, scale, zero, bits)
                error = (column - (code - zero) * scale) / root[:, i, i].view(-1, 1, 1)
                errors[:, i - start : i - start + 1] = error
                if within:
                    row = root[:, i, i + 1 : end].unsqueeze(2)
                    w[:, i + 1 : end].addcmul_(row, error, value=-1)
            w[:, end:] -= root[:, start:end, end:].mT @ errors
        scale, zero = (torch.cat(t, dim=1).mT.to(stack.dtype) for t in (scales, zeros))
        return Coded(codes.mT.to(torch.uint8), scale, zero)
