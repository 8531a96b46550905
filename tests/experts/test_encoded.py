"""Encoded forms: what is stored is what runs, and it answers as whole experts do."""

import copy
import dataclasses

import pytest
import torch

from families import CONFIGS, tiny
from rerail.experts.base import bank_class, build_bank
from rerail.experts.encoded import EncodedExperts
from rerail.moe.families import set_implementations
from rerail.moe.model import MoELayer, MoEModel
from stored_forms import KINDS, solved

FORMS = [name for name in KINDS if issubclass(bank_class(name.split()[0]), EncodedExperts)]
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.06}
SLOTS = (0, 1, 2, 3, 4, 5, 1, 3)  # nothing is routed to stored experts 6 and 7


def banks(model: MoEModel, form: str, slots=SLOTS, dtype=torch.float32):
    """Return what runs from what is stored, and the same experts made whole."""
    layer = model.layers[0]
    plan = solved(model, form)
    spec, tensors = plan.layers[0].bank, plan.of_layer(layer.index)
    stocks = {layer.index: layer.stock().to(dtype)}
    whole = dataclasses.replace(spec, options={**spec.options, "run": "materialised"})
    return [build_bank(s, slots, layer.index, stocks, tensors) for s in (spec, whole)]


def asked(layer: MoELayer, count: int = 20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(count, layer.hidden_size, generator=generator).to(dtype)
    index = torch.randint(0, 8, (count, 2), generator=generator)
    return hidden, index, torch.rand(count, 2, generator=generator).to(dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype=torch.float32) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    scale = expected.abs().max().clamp(min=1e-3)
    assert (actual - expected).abs().max() <= DTYPES[dtype] * scale


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_answers_as_its_whole_experts_do_and_so_do_its_gradients(family, form):
    model = tiny(family)
    stored, whole = banks(model, form)
    answers = []
    for bank in (stored, whole):
        hidden, index, weights = asked(model.layers[0])
        hidden.requires_grad_(), weights.requires_grad_()
        out = bank(hidden, index, weights)
        out.sin().sum().backward()
        answers.append((out.detach(), hidden.grad, weights.grad))
    for mine, expected in zip(*answers, strict=True):
        assert_near(mine, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("form", FORMS)
def test_it_does_so_in_every_dtype_and_under_every_implementation(
    form, family, implementation, dtype
):
    model = tiny(family)
    stored, whole = banks(model, form, dtype=dtype)
    # the family's own grouped products take no float64: those here do
    wide = implementation == "grouped_mm" and dtype == torch.float64
    whole.shell.config = copy.deepcopy(whole.config)
    set_implementations(stored.config, {"experts_implementation": implementation})
    set_implementations(
        whole.config, {"experts_implementation": "eager" if wide else implementation}
    )
    for count in (20, 1):
        inputs = asked(model.layers[0], count, dtype)
        assert_near(stored(*inputs), whole(*inputs), dtype)
    hidden, index, weights = asked(model.layers[0], 0, dtype)
    assert stored(hidden, index, weights).shape == hidden.shape


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("form", FORMS)
def test_no_more_is_in_memory_than_is_stored(family, form):
    model = tiny(family)
    stored, _ = banks(model, form)
    in_memory = sum(t.nbytes for t in [*stored.parameters(), *stored.buffers()])
    slots = stored.slots.nbytes
    assert in_memory - slots == sum(stored.stored_bits(32).values()) / 8
    stored(*asked(model.layers[0]))
    assert sum(t.nbytes for t in [*stored.parameters(), *stored.buffers()]) == in_memory
    assert not hasattr(stored.shell, "gate_up_proj")


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_keeps_no_decoded_matrix(form):
    model = tiny("qwen3_moe")
    stored, _ = banks(model, form)
    own = {p.data_ptr() + offset for p in stored.parameters() for offset in range(p.nbytes)}
    hidden, index, weights = asked(model.layers[0], 3)
    seen = []

    def remember(tensor):
        inside = tensor.data_ptr() in own
        rows = tensor.shape[0] if tensor.dim() else 0
        seen.append(inside or rows <= 6 or tensor.dtype == torch.int64)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        stored(hidden.requires_grad_(), index, weights)
    assert seen
    assert all(seen)
