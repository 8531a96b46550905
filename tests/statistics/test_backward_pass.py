import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import students
from families import CONFIGS, tiny
from measuring import batches
from rerail.errors import InputError
from rerail.methods.d2_moe import Fisher
from rerail.moe.model import MoEModel
from rerail.statistics.collect import collect


def reference(model: MoEModel) -> dict[int, Tensor]:
    """Plain autograd on the fused tensors, one sequence after another."""
    parameters = {la.index: [la.experts.gate_up_proj, la.experts.down_proj] for la in model.layers}
    flat = [p.requires_grad_(True) for pair in parameters.values() for p in pair]
    sums = [torch.zeros(len(p), p[0].numel()) for p in flat]
    for input_ids, mask in batches():
        for ids, valid in zip(input_ids, mask, strict=True):
            ids = ids[valid]
            logits = model.model(input_ids=ids[None], use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1], ids[1:])
            for total, gradient in zip(sums, torch.autograd.grad(loss, flat), strict=True):
                total += gradient.flatten(1) ** 2
    for p in flat:
        p.requires_grad_(False)
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return {i: torch.cat(pair, 1) for i, pair in zip(parameters, pairs, strict=True)}


@pytest.mark.parametrize("family", CONFIGS)
def test_squares_are_those_of_autograd_on_whole_tensors(family: str) -> None:
    model = tiny(family)
    for implementation in ("eager", "grouped_mm"):
        model.model.set_experts_implementation(implementation)
        found = collect(model, batches(), [Fisher()])
        for i, expected in reference(model).items():
            held = found.tensors[i]["fisher"]
            assert held.shape == (8, model.layers[i].dims.numbers["gate_up_proj"] * 3 // 2)
            scale = float(expected.max())
            torch.testing.assert_close(held, expected, atol=1e-5 * scale, rtol=1e-3)


def test_nothing_keeps_a_gradient_and_flags_come_back() -> None:
    model = tiny("qwen3_moe")
    rows = model.layers[0].router_rows.requires_grad_(True)
    flags = {n: p.requires_grad for n, p in model.model.named_parameters()}
    experts = [layer.experts for layer in model.layers]
    collect(model, batches(), [Fisher()])
    assert {n: p.requires_grad for n, p in model.model.named_parameters()} == flags
    assert rows.requires_grad
    assert all(p.grad is None for p in model.model.parameters())
    assert all(la.experts is e for la, e in zip(model.layers, experts, strict=True))


def test_flags_and_experts_come_back_when_the_pass_fails() -> None:
    model = tiny("qwen3_moe")
    model.model.requires_grad_(True)
    experts = [layer.experts for layer in model.layers]
    with pytest.raises(IndexError):
        collect(model, [(torch.full((1, 4), 99), torch.ones(1, 4, dtype=torch.bool))], [Fisher()])
    assert all(p.requires_grad for p in model.model.parameters())
    assert [layer.experts for layer in model.layers] == experts


def test_batches_do_not_matter_and_shards_add() -> None:
    model, statistic = tiny("qwen3_moe"), Fisher()
    whole = collect(model, batches(size=6), [statistic])
    first, second = (collect(model, part, [statistic]) for part in (batches()[:1], batches()[1:]))
    merged = first.merge(second, [statistic])
    for i, held in whole.tensors.items():
        torch.testing.assert_close(merged.tensors[i]["fisher"], held["fisher"])


def test_a_sequence_without_targets_adds_nothing() -> None:
    model = tiny("qwen3_moe")
    ids, mask = torch.tensor([[3, 4, 5]]), torch.tensor([[True, False, False]])
    assert not collect(model, [(ids, mask)], [Fisher()]).tensors[0]["fisher"].any()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_slots_that_share_a_stored_expert_get_its_gradient(implementation: str) -> None:
    student = students.merged(tiny("qwen3_moe"))
    student.model.set_experts_implementation(implementation)
    held = collect(student, batches(), [Fisher()]).tensors[1]["fisher"]
    assert torch.equal(held[::2], held[1::2])
    assert not torch.equal(held[0], held[2])


def test_an_implementation_that_copies_weights_is_refused() -> None:
    model = tiny("qwen3_moe")
    model.model.set_experts_implementation("batched_mm")
    with pytest.raises(InputError, match=r"gradients of .*'batched_mm' cannot be measured"):
        collect(model, batches(), [Fisher()])
