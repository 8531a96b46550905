"""Plans made by hand, one for each stored form, for tiny models of 2 layers and 8 experts."""

import torch

from rerail.experts.base import BankSpec, bank_class
from rerail.experts.residual import largest
from rerail.plan.plan import LayerPlan, Plan

UNEVEN = ((0, 1, 2), (0, 1, 2, 3))
KEPT = ((0, 2, 5, 7), (1, 3, 4, 6))  # two of each half, so that two groups stay equal
ALL = tuple(range(8))


def whole(layer, experts):
    return BankSpec("dense", len(experts), tuple(((layer, e, 1.0),) for e in experts))


def planned(kept, slots, router, spec):
    """A plan of one part a layer; `spec(layer)` says what is stored."""
    parts = [LayerPlan(i, k, tuple(slots(k)), router, spec(i)) for i, k in enumerate(kept)]
    return Plan(tuple(parts), {"compressor": "by hand"})


def sliced(kept=KEPT):
    return planned(kept, lambda k: range(len(k)), "slice", lambda i: whole(i, kept[i]))


def masked(kept=KEPT):
    def slots(k):
        return [k.index(s) if s in k else 0 for s in ALL]

    return planned(kept, slots, "mask", lambda i: whole(i, kept[i]))


def aliased():
    slots = (0, 0, 0, 1, 1, 1, 2, 2)
    return planned((ALL, ALL), lambda _: slots, "untouched", lambda i: whole(i, (1, 4, 6)))


def merged():
    def spec(layer):
        pairs = [((layer, 2 * i, 0.25), (layer, 2 * i + 1, 0.75)) for i in range(4)]
        return BankSpec("dense", 4, tuple(pairs))

    return planned((ALL, ALL), lambda _: (0, 0, 1, 1, 2, 2, 3, 3), "untouched", spec)


def lent():
    """Both layers are answered by the experts of the first."""
    return planned((ALL, ALL), lambda _: ALL, "untouched", lambda _: whole(0, ALL))


def factored():
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (8, 8, 4), "alpha": (8, 2), "B": (2, 4, 16)}
    tensors = {
        f"layers.{layer}.{name}.{part}": torch.randn(shape, generator=generator) * 0.3
        for layer in range(2)
        for name in ("gate", "up", "down")
        for part, shape in shapes.items()
    }
    options = {"matrices": "gate+up+down", "activation": "silu"}
    spec = BankSpec("basis", 8, (), {"rank": 4, "bases": 2}, options)
    parts = planned((ALL, ALL), lambda _: ALL, "untouched", lambda _: spec).layers
    return Plan(parts, {}, tensors)


BITS = (1, 2, 3, 4, 8, 16, 2, 4)
GROUPS = (1, 0, 0, 1, 1, 0, 1, 0)
WIDTHS = (3, 8, 5, 1, 8, 2, 4, 6)
KINDS = {
    "basis": ({"rank": 4, "bases": 2}, {"matrices": "gate+up", "activation": "silu"}),
    "basis of all": ({"rank": 4, "bases": 2}, {"matrices": "gate+up+down", "activation": "tanh"}),
    "low_rank": ({"gate": BITS, "up": (2,) * 8, "down": WIDTHS}, {"rows": "own"}),
    "delta": ({"gate": 3, "up": 2, "down": 4}, {"rows": "shared"}),
    "narrow": ({"widths": WIDTHS}, {}),
    "quantized": ({"bits": BITS, "group": 5}, {}),
    "residual": ({"values": 90}, {"residual": "sparse"}),
    "residual of low rank": ({"rank": BITS}, {"residual": "low_rank"}),
    "grouped_basis": (
        {"gate": (3, 2), "up": (1, 4), "groups": GROUPS, "bases": 1, "buckets": 9, "seed": 3},
        {"activation": "silu"},
    ),
    "grouped_basis of two": (
        {"gate": (3, 2), "up": (1, 4), "groups": GROUPS, "bases": 2, "buckets": 0, "seed": 0},
        {"activation": "tanh"},
    ),
    "tucker": ({"gate": (8, 3, 5), "up": (3, 2, 4), "down": (8, 1, 2)}, {}),
    "novice": ({"kept": (1, 4, 6)}, {}),
    "packed_channels": (
        {
            "bits": (16, 3, 1),
            "widths": (1, 0, 2, 0, 1, 0, 0, 3, 2, 4, 0, 0, 3, 0, 8, 1, 5, 1, 3, 0, 2, 1, 0, 0),
            "group": 5,
        },
        {},
    ),
    "puzzle": ({"pairs": (6, 1, 3, 4)}, {"store": "words"}),
    "puzzle of codes": (
        {"pairs": (6, 1, 3, 4, 0, 2, 7, 5), "bits": 3, "group": 5},
        {"store": "codes"},
    ),
}
BYTES = {"codes": 256, "signs": 256, "masks": 243}  # values that a stored byte can have


def solved(teacher, name, **changed):
    """A plan whose layers hold random tensors of one kind, in the shapes that the kind asks for."""
    kind, (integers, options) = name.split()[0], KINDS[name]
    integers = {**integers, **changed}
    generator = torch.Generator().manual_seed(0)
    parts, tensors = [], {}
    for layer in teacher.layers:
        biased = kind in ("narrow", "packed_channels", "residual")
        if biased and "gate_up_proj_bias" in layer.dims.numbers:
            options = {**options, "biases": "gate+up"}
        rows = tuple(range(layer.num_experts))
        spec = BankSpec(kind, len(rows), (), integers, options)
        for key, shape in bank_class(kind).shapes(spec, layer.dims).items():
            numbers = torch.randn(shape, generator=generator) * 0.3
            part = key.rpartition(".")[2]
            if part in BYTES:
                numbers = (numbers * 300).to(torch.int64).remainder(BYTES[part]).to(torch.uint8)
            if part == "words":
                numbers = (numbers * 10_000).to(torch.int16)
            if key == "mask":
                entries = torch.rand(8, 3, *layer.dims[1:3], generator=generator)
                numbers = largest(entries, 90)[0]
            tensors[f"layers.{layer.index}.{key}"] = numbers
        parts.append(LayerPlan(layer.index, rows, rows, "untouched", spec))
    return Plan(tuple(parts), {}, tensors)


def fused(teacher):
    """Three whole experts that are sums of nothing."""
    generator = torch.Generator().manual_seed(0)
    parts, tensors = [], {}
    for layer in teacher.layers:
        own = {n: p for n, p in layer.experts.named_parameters() if p.shape[0] == 8}
        spec = BankSpec("merged", 3, (), {n: tuple(p.shape[1:]) for n, p in own.items()})
        for name, parameter in own.items():
            numbers = torch.randn((3, *parameter.shape[1:]), generator=generator) * 0.3
            tensors[f"layers.{layer.index}.{name}"] = numbers
        slots = (0, 0, 1, 1, 2, 2, 0, 1)
        parts.append(LayerPlan(layer.index, ALL, slots, "untouched", spec))
    return Plan(tuple(parts), {}, tensors)


def skipping(protect="0"):
    """Slots below a third of what they and their betters hold are not computed."""
    spec = BankSpec("skip_policy", 8, (), {}, {"protect": protect} if float(protect) else {})
    parts = [LayerPlan(i, ALL, ALL, "untouched", spec) for i in range(2)]
    tensors = {f"layers.{i}.threshold": torch.tensor([6000]) for i in range(2)}
    return Plan(tuple(parts), {}, tensors)
