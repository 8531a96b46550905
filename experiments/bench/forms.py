"""Memory and speed of students by the form in which they store experts, against the dense model.

Stored tensors are random: only their shapes and dtypes count here. Sizes are those that presets of
factorisers ask for at half of the bytes of experts; of others see `specs`.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from models import Size, random_model
from timing import Row, interleaved, ratio, row
from torch import Tensor

from rerail.compress.base import Compressor
from rerail.compress.templates.factoriser import Factoriser
from rerail.config.presets import config_root, preset
from rerail.errors import OutOfReach
from rerail.experts.base import BankSpec, bank_class
from rerail.experts.residual import largest
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.apply import apply_plan
from rerail.plan.plan import LayerPlan, Plan

PREFILL = 2_048  # tokens of the forward
TOKENS = 8  # generated one by one
LIMITS = {"memory": 1.1, "prefill": 1.3}
SVD_LIMIT = 1.0  # of a prefill: its products halve
BITS = (1, 2, 3, 4, 8)
BYTES = {"codes": 256, "signs": 256, "masks": 243}  # values that a stored byte can have


def specs(layer: MoELayer) -> Iterator[tuple[str, BankSpec]]:
    """Yield the stored forms by name."""
    experts, width = layer.num_experts, layer.intermediate_size
    half = layer.expert_size * experts // 2
    for name in sorted(p.stem for p in (config_root() / "conf" / "compressor").glob("*.yaml")):
        compressor: Compressor = preset("compressor", name)
        if isinstance(compressor, Factoriser):
            with contextlib.suppress(OutOfReach):
                yield name, compressor.spec(layer, compressor.sizes(layer, half))
    for bits in BITS:
        integers = {"bits": (bits,) * experts, "group": 128}
        yield f"quantized, {bits} bits", BankSpec("quantized", experts, (), integers)
    mixed = tuple(1 + e % 3 for e in range(experts))
    yield (
        "quantized, 1 to 3 bits",
        BankSpec("quantized", experts, (), {"bits": mixed, "group": 128}),
    )
    pairs = tuple(range(experts))
    yield "puzzle, words", BankSpec("puzzle", experts, (), {"pairs": pairs}, {"store": "words"})
    coded = {"pairs": pairs, "bits": 3, "group": 128}
    yield "puzzle, 3-bit codes", BankSpec("puzzle", experts, (), coded, {"store": "codes"})
    channels = tuple(w for w in (width // 4, width // 2, width // 4) for _ in range(experts))
    classes = {"bits": (3, 2, 1), "widths": channels, "group": 128}
    yield "packed channels, 1 to 3 bits", BankSpec("packed_channels", experts, (), classes)
    widths = tuple(width // 4 + e * width // (2 * experts) for e in range(experts))
    yield "narrow, uneven", BankSpec("narrow", experts, (), {"widths": widths})


def student(teacher: MoEModel, spec: BankSpec) -> MoEModel:
    """Return the student of random stored tensors."""
    generator, parts, tensors = torch.Generator().manual_seed(0), [], {}
    for layer in teacher.layers:
        rows = tuple(range(layer.num_experts))
        parts.append(LayerPlan(layer.index, rows, rows, "untouched", spec))
        for name, shape in bank_class(spec.kind).shapes(spec, layer.dims).items():
            tensors[f"layers.{layer.index}.{name}"] = _random(name, shape, spec, layer, generator)
    return apply_plan(teacher, Plan(tuple(parts), {}, tensors))


def _random(
    name: str, shape: tuple[int, ...], spec: BankSpec, layer: MoELayer, generator: torch.Generator
) -> Tensor:
    part = name.rpartition(".")[2]
    if part in BYTES:
        return torch.randint(0, BYTES[part], shape, generator=generator, dtype=torch.uint8)
    if part == "words":
        return torch.randint(0, 2**14, shape, generator=generator, dtype=torch.int16)
    if part == "mask":
        sizes = (layer.num_experts, 3, layer.intermediate_size, layer.hidden_size)
        return largest(torch.rand(sizes, generator=generator), spec.integer("values"))[0]
    return torch.empty(shape).normal_(0, 0.02, generator=generator)


def prefill(model: MoEModel, ids: Tensor) -> Callable[[], None]:
    def work() -> None:
        with torch.no_grad():
            model.model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return work


def decode(model: MoEModel, ids: Tensor) -> Callable[[], None]:
    """One token after another, each after the keys and values of those before it."""

    def work() -> None:
        with torch.no_grad():
            cache = None
            for token in ids[0, :TOKENS]:
                out = model.model(
                    input_ids=token[None, None], past_key_values=cache, use_cache=True
                )
                cache = out.past_key_values

    return work


def bytes_in_memory(model: MoEModel) -> int:
    """Return the bytes of all tensors of the routed experts."""
    tensors = {
        id(t): t.nbytes
        for layer in model.layers
        for t in [*layer.experts.parameters(), *layer.experts.buffers()]
    }
    return sum(tensors.values())


def bytes_stored(model: MoEModel) -> float:
    return sum(sum(layer.stored_bits(32).values()) for layer in model.layers) / 8


def form_rows(size: Size, rounds: int, names: Sequence[str] | None = None) -> list[Row]:
    """Measure the forms that have these names; None for all."""
    teacher, rows = random_model(size), list[Row]()
    generator = torch.Generator().manual_seed(0)
    shape = (-(-PREFILL // size.length), size.length)
    ids = torch.randint(0, size.vocabulary, shape, generator=generator)
    for name, spec in specs(teacher.layers[0]):
        if names is None or name in names:
            rows += rows_of(name, teacher, student(teacher, spec), ids, rounds)
    return rows


def rows_of(name: str, teacher: MoEModel, made: MoEModel, ids: Tensor, rounds: int) -> list[Row]:
    """Return one form's bytes in memory, and its seconds of a prefill and of single tokens."""
    held, dense = bytes_in_memory(made), bytes_in_memory(teacher)
    rows = [
        row(f"{name}: experts in memory / stored", held / bytes_stored(made), LIMITS["memory"]),
        row(f"{name}: experts in memory / dense", held / dense),
    ]
    for kind, (make, tokens) in {
        "prefill": (prefill, ids.numel()),
        "decode": (decode, TOKENS),
    }.items():
        times = interleaved({"dense": make(teacher, ids), "student": make(made, ids)}, rounds)
        limit = SVD_LIMIT if (name, kind) == ("svd", "prefill") else LIMITS.get(kind)
        rows.append(row(f"{name}: {kind} / dense", ratio(times, "student", dense=1), limit))
        speed = tokens / statistics.median(times["student"])
        rows.append(row(f"{name}: {kind}", speed, None, "tok/s"))
    return rows
