"""Plans: which router slots stay, which stored expert answers each, in which form. Plain data."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rerail import store
from rerail.errors import InputError
from rerail.experts.base import BankSpec, Stored, bank_class
from rerail.files import digest
from rerail.moe.fused_experts import Dims
from rerail.moe.model import MoELayer
from rerail.plan.validate import validate_layer, validate_names

log = logging.getLogger(__name__)

RouterPolicy = Literal["untouched", "slice", "mask", "pooled"]

ROWS = "router.rows"


@dataclass(frozen=True)
class LayerPlan:
    """The decision about one MoE layer.

    Attributes:
        layer: index of the decoder layer.
        kept: router slots that can still be selected, ascending, in the teacher's numbering.
        slots: for each router row of the student, the stored expert that answers it.
        router: `untouched` (E rows), `slice` (the kept rows only), `mask` (E rows, of which the
            others are never chosen) or `pooled` (as slice, with the rows of tensor `router.rows`).
        bank: the stored form.
    """

    layer: int
    kept: tuple[int, ...]
    slots: tuple[int, ...]
    router: RouterPolicy
    bank: BankSpec


@dataclass(frozen=True)
class Plan:
    """All decisions about a model, with their lineage; solved tensors travel beside it.

    Attributes:
        layers: one entry per changed layer; a layer that is not named stays as it is.
        lineage: how the plan came about (method, ratio, sizes); JSON-able.
        tensors: solved tensors, named `layers.<index>.<name>`.
        then: a further plan, made for the student of this one.
    """

    layers: tuple[LayerPlan, ...] = ()
    lineage: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    then: "Plan | None" = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data (without the tensors)."""
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        then = {"then": self.then.to_json()} if self.then else {}
        return {"layers": layers, "lineage": dict(self.lineage)} | then

    def all_tensors(self) -> dict[str, Tensor]:
        """Return the solved tensors of all stages; those of later ones begin with `then.`."""
        later = self.then.all_tensors() if self.then else {}
        return dict(self.tensors) | {f"then.{name}": t for name, t in later.items()}

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> "Plan":
        """Inverse of `to_json`, also after a trip through text.

        Raises:
            InputError: the data is not what `to_json` returns.
        """
        own = dict(tensors or {})
        later = {n.removeprefix("then."): own.pop(n) for n in list(own) if n.startswith("then.")}
        try:
            layers = tuple(_layer_from(entry) for entry in data["layers"])
            then = cls.from_json(data["then"], later) if "then" in data else None
            return cls(layers, dict(data["lineage"]), own, then)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"this is no plan of this version ({error!r})") from error

    def save(self, path: Path) -> None:
        """Store the plan in `path` (JSON), and its solved tensors beside it."""
        store.write(path, store.Artefact(self.to_json(), self.all_tensors()))

    @classmethod
    def load(cls, path: Path) -> "Plan | None":
        """Return a stored plan; None where it is absent, or (logged) damaged or of another form."""
        artefact = store.read(path)
        if artefact is None:
            return None
        try:
            return cls.from_json(*artefact)
        except InputError as error:
            log.warning("plan %s cannot be used (%s) and will be made again", path, error)
            return None

    def of_layer(self, index: int) -> dict[str, Tensor]:
        """Return the solved tensors of a layer under their short names."""
        prefix = f"layers.{index}."
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}

    def fingerprint(self) -> str:
        """Return a hash of the decisions, not of the lineage."""
        return digest([json.loads(json.dumps(s.to_json()["layers"])) for s in self.stages])

    @property
    def stages(self) -> "tuple[Plan, ...]":
        """This plan and those that follow it, each made for the student of the one before."""
        return (self, *(self.then.stages if self.then else ()))

    def stored(self, layers: Sequence[MoELayer]) -> int:
        """Return how many numbers the student's routed experts will store; no weight is read."""
        stored: Stored = {}
        for layer in layers:
            spec, dims = self._last(layer)
            if spec is None:
                stored |= layer.stored()
            else:
                stored |= bank_class(spec.kind).predicted(spec, layer.index, dims)
        return sum(stored.values())

    def stored_bits(self, layers: Sequence[MoELayer], width: int) -> int:
        """Return in how many bits, where a dense number takes `width` of them."""
        stored: Stored = {}
        for layer in layers:
            spec, dims = self._last(layer)
            if spec is None:
                stored |= layer.stored_bits(width)
            else:
                stored |= bank_class(spec.kind).predicted_bits(spec, layer.index, dims, width)
        return sum(stored.values())

    def used(self, layers: Sequence[MoELayer]) -> float:
        """Return the numbers of routed experts that the student will read for one token."""
        numbers = 0.0
        for layer in layers:
            spec, dims = self._last(layer)
            if spec is None:
                numbers += layer.used(layer.top_k)
            else:
                bank = bank_class(spec.kind)
                shared, each = bank.used(spec, dims, bank.predicted(spec, layer.index, dims))
                numbers += shared + layer.top_k * each
        return numbers

    def _last(self, layer: MoELayer) -> tuple[BankSpec | None, Dims]:
        """Return a layer's final form, and the sizes of the experts that it was made from."""
        last, dims, now = None, layer.dims, layer.dims
        for stage in self.stages:
            for part in stage.layers:
                if part.layer == layer.index and not bank_class(part.bank.kind).wraps:
                    last, dims, now = part.bank, now, now._replace(experts=len(part.slots))
        return last, dims

    def changed_rows(self, layer: int, experts: int) -> list[bool]:
        """Return of each router row of the student whether another expert answers it than before.

        That is anything but the teacher's own expert of the slot that the row stands for, as it
        was: an alias, a merged, factorised, narrowed, quantised or constant one. An expert that a
        method stored anew counts as changed also where its numbers came out equal.

        Args:
            layer: index of an MoE layer.
            experts: its router rows in the teacher.
        """
        changed = [False] * experts
        for part in (p for stage in self.stages for p in stage.layers if p.layer == layer):
            form = bank_class(part.bank.kind)
            if form.wraps:  # whatever it wraps answers, or nothing does
                continue
            own = form.unchanged(part.bank, layer)
            rows = part.kept if len(part.kept) == len(part.slots) else range(len(part.slots))
            pairs = zip(rows, part.slots, strict=True)
            changed = [own[stored] != row or changed[row] for row, stored in pairs]
        return changed

    def rows_removed(self, layers: Sequence[MoELayer]) -> int:
        """Return how many numbers the routers lose."""
        sizes = {layer.index: layer.row_size for layer in layers}
        rows = {layer.index: layer.num_experts for layer in layers}
        removed = 0
        for part in (part for stage in self.stages for part in stage.layers):
            removed += (rows[part.layer] - len(part.slots)) * sizes[part.layer]
            rows[part.layer] = len(part.slots)
        return removed

    def validate(self, layers: Sequence[MoELayer]) -> None:
        """Check the plan against a model (one on the meta device will do).

        Only this stage is checked: a later one is, when it is applied to this one's student.

        Raises:
            InputError: a layer, expert or slot does not exist, a tensor is missing or misshapen,
                too few rows are selectable for top-k, or a grouped router would break.
        """
        known = {layer.index: layer for layer in layers}
        validate_names([part.layer for part in self.layers], known)
        for part in self.layers:
            try:
                validate_layer(part, known, self.of_layer(part.layer))
            except (TypeError, KeyError, AttributeError, OverflowError) as error:
                raise InputError(
                    f"plan of layer {part.layer} is not of this version ({error!r}); make it again"
                ) from error


def _layer_from(entry: Mapping[str, Any]) -> LayerPlan:
    bank = dict(entry["bank"])
    bank["members"] = tuple(
        tuple((int(layer), int(e), float(w)) for layer, e, w in group) for group in bank["members"]
    )
    bank["integers"] = {
        name: tuple(n) if isinstance(n, list | tuple) else n for name, n in bank["integers"].items()
    }
    kept, slots = tuple(entry["kept"]), tuple(entry["slots"])
    return LayerPlan(entry["layer"], kept, slots, entry["router"], BankSpec(**bank))
