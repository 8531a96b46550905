from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import students
from families import CONFIGS, tiny
from measuring import batches
from rerail.errors import InputError
from rerail.methods.d2_moe import Fisher
from rerail.moe.model import MoELayer, MoEModel
from rerail.statistics.collect import collect
from rerail.statistics.moments import OutputGradientMoment


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


OF_OUTPUTS = [OutputGradientMoment(name) for name in ("gate", "up", "down")]


def with_zeros(layer: MoELayer, zeros: list[tuple[str, Tensor]]) -> Callable[..., Tensor]:
    """Return a forward of all experts on all tokens that adds a zero to each matrix's output."""
    module, (gate, up, down) = layer.experts, layer.stack()
    biases = [
        getattr(module, f"{n}_bias", torch.zeros(8, 1)) for n in ("gate_up_proj", "down_proj")
    ]

    def product(name: str, x: Tensor, weight: Tensor) -> Tensor:
        zeros.append((name, x.new_zeros(len(x), len(weight), requires_grad=True)))
        return x @ weight.T + zeros[-1][1]

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        zeros.clear()
        out = torch.zeros_like(hidden)
        for e in range(8):
            pair = product("gate", hidden, gate[e]), product("up", hidden, up[e])
            joined = torch.stack(pair, dim=1 if layer.layout.concatenated else 2).flatten(1)
            middle = module._apply_gate(joined + biases[0][e])
            made = product("down", middle, down[e]) + biases[1][e]
            out = out + made * (weights * (index == e)).sum(dim=1, keepdim=True)
        return out

    return forward


def output_reference(model: MoEModel) -> dict[int, dict[str, Tensor]]:
    """Gradients of the zeros, one sequence after another."""
    sums = {la.index: {s.matrix: s.empty(la) for s in OF_OUTPUTS} for la in model.layers}
    zeros: dict[int, list[tuple[str, Tensor]]] = {la.index: [] for la in model.layers}
    for layer in model.layers:
        layer.experts.forward = with_zeros(layer, zeros[layer.index])
    pairs = [pair for batch in batches() for pair in zip(*batch, strict=True)]
    for ids, valid in pairs:
        ids = ids[valid]
        logits = model.model(input_ids=ids[None], use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], ids[1:]).backward()
        for i, added in zeros.items():
            for name, zero in added:
                sums[i][name] += zero.grad.double().T @ zero.grad.double()
    return sums


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3"])
def test_moments_of_output_gradients_are_those_of_autograd(
    family: str, implementation: str
) -> None:
    model, plain = tiny(family), tiny(family)
    model.model.set_experts_implementation(implementation)
    alone = collect(model, batches(), OF_OUTPUTS)
    beside = collect(model, batches(), [*OF_OUTPUTS, Fisher()])
    for i, expected in output_reference(plain).items():
        for name, tensor in expected.items():
            for found in (alone, beside):
                held = found.tensors[i][f"output_gradient_moment_{name}"]
                scale = float(tensor.abs().max())
                torch.testing.assert_close(held, tensor, atol=1e-5 * scale, rtol=1e-3)
    fisher = collect(model, batches(), [Fisher()])
    for i, held in fisher.tensors.items():
        torch.testing.assert_close(beside.tensors[i]["fisher"], held["fisher"])


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
