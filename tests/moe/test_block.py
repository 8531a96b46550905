import pytest
import torch

import students
from families import ROUTERS, tiny, tokens
from measuring import Seen
from rerail.errors import InputError
from rerail.moe.fused_experts import expert_parameters

HIDDEN = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
KEPT = (0, 1, 2, 4, 5, 6)


@pytest.mark.parametrize("family", ROUTERS)
@torch.no_grad()
def test_route_and_answer_are_what_the_model_itself_does(family: str) -> None:
    model = tiny(family)
    seen = Seen(model)
    answers: list[torch.Tensor] = []
    for layer in model.layers:
        layer.experts.register_forward_hook(lambda _, __, out: answers.append(out))
    model.hidden(tokens(2, 10))
    handed = [seen.handed[la.index][0] for la in model.layers]
    expected = list(answers)
    for layer, (hidden, index, weights), out in zip(model.layers, handed, expected, strict=True):
        own_index, own_weights = layer.route(hidden)
        assert torch.equal(own_index, index)
        torch.testing.assert_close(own_weights, weights)
        torch.testing.assert_close(layer.answer(hidden), out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ROUTERS)
@torch.no_grad()
def test_only_the_slots_asked_for_answer(family: str) -> None:
    """As a model whose router is masked for good; the layer itself is left as it was."""
    model, other = tiny(family), tiny(family)
    layer, masked = model.layers[0], other.layers[0]
    masked.mask_rows(KEPT)
    plain, router = layer.answer(HIDDEN), layer.router
    index, _ = layer.route(HIDDEN, KEPT)
    assert set(index.flatten().tolist()) <= set(KEPT)
    assert torch.equal(layer.answer(HIDDEN, KEPT), masked.answer(HIDDEN))
    assert not torch.equal(layer.answer(HIDDEN, KEPT), plain)
    assert layer.router is router
    assert torch.equal(layer.answer(HIDDEN), plain)


def test_a_bank_answers_for_its_slots() -> None:
    teacher = tiny("qwen3_moe")
    layer = students.sliced(teacher).layers[0]
    expected = teacher.layers[0].answer(HIDDEN, students.KEPT)
    torch.testing.assert_close(layer.answer(HIDDEN), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_experts_run_with_other_weights() -> None:
    layer = tiny("qwen3_moe").layers[0]
    index, weights = layer.route(HIDDEN)
    down = expert_parameters(layer.experts)["down_proj"]
    doubled = layer.run(HIDDEN, index, weights, down_proj=2 * down)
    torch.testing.assert_close(doubled, 2 * layer.answer(HIDDEN))
    assert layer.experts.down_proj is down


@torch.no_grad()
def test_a_banks_experts_run_with_other_weights() -> None:
    layer = students.merged(tiny("qwen3_moe")).layers[0]
    index, weights = layer.route(HIDDEN)
    down = layer.experts.dense()["down_proj"][layer.experts.slots]
    doubled = layer.run(HIDDEN, index, weights, down_proj=2 * down)
    torch.testing.assert_close(doubled, 2 * layer.answer(HIDDEN))


def test_a_masked_router_stays_masked() -> None:
    layer = tiny("qwen3_moe").layers[0]
    expected = layer.answer(HIDDEN, (0, 1, 2, 4))
    layer.mask_rows(KEPT)
    assert torch.equal(layer.answer(HIDDEN, (0, 1, 2, 3, 4)), expected)


def test_too_few_slots_are_refused() -> None:
    layer = tiny("qwen3_moe").layers[0]
    with pytest.raises(InputError, match="1 selectable experts are too few"):
        layer.answer(HIDDEN, (3,))
    layer.mask_rows(KEPT)
    with pytest.raises(InputError, match="1 selectable experts are too few"):
        layer.answer(HIDDEN, (3, 4, 7))


def test_a_router_that_fails_leaves_the_block_as_it_was() -> None:
    layer = tiny("qwen3_moe").layers[0]
    router, experts = layer.router, layer.experts
    with pytest.raises(RuntimeError):
        layer.answer(torch.randn(4, 7), KEPT)
    assert (layer.router, layer.experts) == (router, experts)
