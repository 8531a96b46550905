"""What a model is worth on held-out texts: one value of a type, block by block, for every text."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from beartype import BeartypeConf, beartype
from numpy.typing import NDArray
from torch import Tensor

from rerail.evaluate.estimates import mean_and_se
from rerail.evaluate.perplexity import score_blocks
from rerail.evaluate.routing import Routing, load_by_expert, routing_changed
from rerail.moe.model import MoEModel
from rerail.plan.plan import Plan
from rerail.statistics.collect import Progress
from rerail.text.calibration import TokenBlocks

# a field of the wrong type is refused by its name; an int will do where a float is asked for
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


@_checked
@dataclass(frozen=True)
class LayerRouting:
    """How one MoE layer routes a text.

    Attributes:
        layer: its index.
        load_entropy: entropy of the slots' shares of choices over its maximum, in [0, 1].
        load: share of all choices of each of the teacher's slots; None for one that is gone.
        routing_changed: share of tokens that choose other slots than the teacher; None for itself.
        changed_choices: share of choices (token, slot) that are answered by anything but the
            teacher's own expert of that slot as it was; 0 for the teacher.
        changed_mass: the same, each choice weighted by its gate weight.
    """

    layer: int
    load_entropy: float
    load: list[float | None]
    routing_changed: float | None = None
    changed_choices: float = 0.0
    changed_mass: float = 0.0


@_checked
@dataclass(frozen=True)
class TextScores:
    """Sums over the targets of each block of one text (N blocks), so that models can be paired.

    Attributes:
        nll: negative log-likelihood in nats.
        tokens: number of targets.
        kl: forward KL from the teacher, in nats.
        esap: chance that the teacher accepts the student's token, sum_v min(p_teacher, p_student).
        agree: how often the most likely token is the teacher's.
        active: experts computed for a token and layer, on average.
        layers: routing, layer by layer.
    """

    nll: list[float]
    tokens: list[float]
    kl: list[float]
    esap: list[float]
    agree: list[float]
    active: float
    layers: list[LayerRouting]


@dataclass(frozen=True, repr=False)
class Scores:
    """Scores of one model on all held-out texts; means are over all tokens.

    Standard errors are clustered by block, and None for a single block.

    Attributes:
        texts: scores by the name of the text.
        tensors: of a teacher, what students are compared with: `<text>.hidden` (N, S, H), the final
            hidden states, and `<text>.chosen.<layer>` (T, K), the chosen slots.
    """

    texts: Mapping[str, TextScores]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_plain(
        cls, data: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]
    ) -> "Scores":
        """Return the scores that `plain` took apart.

        Raises:
            TypeError: a field is missing or unknown.
            BeartypeCallHintViolation: a field is of the wrong type.
        """
        texts = {}
        for name, fields in data.items():
            layers = [LayerRouting(**layer) for layer in fields["layers"]]
            texts[name] = TextScores(**{**fields, "layers": layers})
        return cls(texts, tensors)

    def plain(self) -> dict[str, Any]:
        """Return all but the tensors as JSON has it."""
        return {name: dataclasses.asdict(scores) for name, scores in self.texts.items()}

    def pooled(self, name: str) -> NDArray[np.float64]:
        """Return the sums of all blocks of all texts, in the order of the texts' names."""
        return np.concatenate(
            [np.asarray(getattr(self.texts[t], name)) for t in sorted(self.texts)]
        )

    def mean(self, name: str) -> tuple[float, float | None]:
        """Return the mean of `nll`, `kl`, `esap` or `agree` a token, and its standard error."""
        return mean_and_se(self.pooled(name), self.pooled("tokens"))

    @property
    def nll(self) -> float:
        """Negative log-likelihood, nats a token."""
        return self.mean("nll")[0]

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def kl(self) -> float:
        """KL from the teacher, nats a token."""
        return self.mean("kl")[0]

    @property
    def esap(self) -> float:
        """Mean over tokens of sum_v min(p_teacher, p_student), in [0, 1]."""
        return self.mean("esap")[0]

    @property
    def agreement(self) -> float:
        """Share of tokens with the teacher's most likely next token."""
        return self.mean("agree")[0]

    @property
    def tokens(self) -> int:
        """Number of targets."""
        return int(self.pooled("tokens").sum())

    @property
    def active_experts(self) -> float:
        """Experts computed for a token and layer, on average over all tokens."""
        return float(self._weighted([scores.active for scores in self.texts.values()]))

    def _weighted(self, values: Sequence[Any]) -> Any:
        weights = [sum(scores.tokens) for scores in self.texts.values()]
        mean = np.average(np.array(values, float), axis=0, weights=weights)
        return mean if mean.ndim else float(mean)

    def layers(self) -> list[LayerRouting]:
        """Return the routing of every layer, weighted over the texts by their tokens."""
        return [
            LayerRouting(
                parts[0].layer,
                self._weighted([part.load_entropy for part in parts]),
                [
                    None if np.isnan(share) else round(float(share), 6)
                    for share in self._weighted([part.load for part in parts])
                ],
                None
                if parts[0].routing_changed is None
                else self._weighted([part.routing_changed for part in parts]),
                self._weighted([part.changed_choices for part in parts]),
                self._weighted([part.changed_mass for part in parts]),
            )
            for parts in zip(*(scores.layers for scores in self.texts.values()), strict=True)
        ]

    def __repr__(self) -> str:
        means = {name: self.mean(name) for name in ("nll", "kl", "esap", "agree")}
        shown = [
            f"{name}={mean:.5g}" + ("" if se is None else f"±{se:.2g}")
            for name, (mean, se) in means.items()
        ]
        return f"Scores({', '.join(shown)}, tokens={self.tokens})"


def score_texts(
    model: MoEModel,
    texts: Mapping[str, TokenBlocks],
    reference: Scores | None = None,
    plan: Plan | None = None,
    batch_size: int = 16,
    progress: Callable[[str], Progress] = lambda _: lambda batches: batches,
) -> Scores:
    """Score a model on held-out texts.

    In a group of processes all must call it, and each scores its part of every text.

    Args:
        model: teacher or student.
        texts: what to score, by name.
        reference: the teacher's scores of the same texts with their tensors; None for the teacher.
        plan: of the student, which says what slots its router rows stand for.
        batch_size: blocks a forward.
        progress: from the name of a text to what wraps its batches, to show a bar.
    """
    scored: dict[str, TextScores] = {}
    tensors: dict[str, Tensor] = {}
    for name, text in texts.items():
        states = None if reference is None else reference.tensors[f"{name}.hidden"]
        scores = score_blocks(model, list(text.batches(batch_size)), states, progress(name))
        if reference is None:
            assert scores.hidden is not None
            tensors[f"{name}.hidden"] = scores.hidden
            tensors |= {
                f"{name}.chosen.{i}": scores.routing.slots(i) for i in scores.routing.chosen
            }
            slots = scores.routing.num_slots
            layers = [_routing(scores.routing, i, Plan(), n) for i, n in slots.items()]
        else:
            layers = _moved(name, scores.routing, reference, plan or Plan())
        names = ("nll", "tokens", "kl", "esap", "agree")
        sums = {n: getattr(scores, n).tolist() for n in names}
        scored[name] = TextScores(**sums, active=scores.routing.mean_active_experts, layers=layers)
    return Scores(scored, tensors)


def _rows(plan: Plan) -> dict[int, tuple[int, ...]]:
    """Return the teacher's slots behind the rows of shortened routers, by layer."""
    return {part.layer: part.kept for part in plan.layers if part.router in ("slice", "pooled")}


def _routing(
    routing: Routing, layer: int, plan: Plan, slots: int, moved: float | None = None
) -> LayerRouting:
    load = load_by_expert(routing, layer, _rows(plan), slots)
    changed = routing.share_of(layer, torch.tensor(plan.changed_rows(layer, slots)))
    return LayerRouting(layer, routing.load_entropy(layer), load, moved, *changed)


def _moved(name: str, routing: Routing, reference: Scores, plan: Plan) -> list[LayerRouting]:
    """Return how a student routes a text, beside the teacher's choices."""
    # the teacher's choices as they were recorded: its model is not run again
    chosen = {i: [reference.tensors[f"{name}.chosen.{i}"]] for i in routing.chosen}
    moved = routing_changed(Routing(chosen, dict(routing.num_slots)), routing, _rows(plan))
    slots = {layer.layer: len(layer.load) for layer in reference.texts[name].layers}
    return [_routing(routing, i, plan, slots[i], moved[i]) for i in moved]
