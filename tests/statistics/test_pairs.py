import pytest
import torch
from torch import Tensor

import stored_forms as forms
import students
from families import CONFIGS, tiny, tokens
from measuring import batches
from rerail.errors import InputError
from rerail.experts.base import BankSpec
from rerail.methods.d2_moe import Fisher
from rerail.moe.model import MoEModel
from rerail.plan.apply import apply_plan
from rerail.plan.plan import LayerPlan, Plan
from rerail.statistics.collect import collect
from rerail.statistics.moments import MiddleMoment
from rerail.statistics.pairs import answer, pairs_and_middle
from rerail.statistics.squares import MiddleEnergy


def down_again(layer, middle: Tensor, index: Tensor) -> Tensor:
    """Return the outputs (T, K, H) that middle activations give."""
    down = torch.stack([layer.expert(e).down for e in range(layer.num_experts)])
    outputs = torch.einsum("tki,tkhi->tkh", middle, down[index])
    if layer.layout.transposed:
        outputs = outputs + layer.experts.down_proj_bias[index]
    return outputs


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_down_projections_of_the_middle_are_the_outputs(family: str, implementation: str) -> None:
    model = tiny(family)
    model.model.set_experts_implementation(implementation)
    layer = model.layers[1]
    hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    index, _ = layer.route(hidden)
    pairs, middle = pairs_and_middle(layer.experts, hidden, index)
    assert middle.shape == (40, 2, layer.intermediate_size)
    torch.testing.assert_close(down_again(layer, middle, index), pairs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_answers_are_the_experts_own_to_the_bit_and_grouped_ones_run_once(
    family: str, dtype: torch.dtype, implementation: str
) -> None:
    model = tiny(family)
    model.model.to(dtype).set_experts_implementation(implementation)
    layer, calls = model.layers[1], list[Tensor]()
    hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    index, weights = layer.route(hidden)
    wanted = layer.experts(hidden, index, weights)
    pairs, middle = pairs_and_middle(layer.experts, hidden, index)
    layer.experts.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    whole = answer(layer.experts, hidden, index, weights, {"norms", "outputs", "middle"})
    norms = torch.linalg.vector_norm(pairs, dim=-1, dtype=torch.float32)
    theirs = {"routed": wanted, "norms": norms, "outputs": pairs, "middle": middle}
    assert whole.keys() == theirs.keys()
    assert all(torch.equal(whole[name], theirs[name]) for name in theirs)
    assert [len(rows) for rows in calls] == [40 if implementation == "grouped_mm" else 80]
    few = answer(layer.experts, hidden, index, weights, {"norms"})
    assert few.keys() == {"routed", "norms"}
    assert torch.equal(few["norms"], norms)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("form", [students.sliced, students.masked, students.merged])
@torch.no_grad()
def test_the_middle_of_a_students_bank_is_seen_too(form, implementation: str) -> None:
    """Slots that share a stored expert, or read a row of another number."""
    student = form(tiny("qwen3_moe"))
    student.model.set_experts_implementation(implementation)
    layer = student.layers[1]
    hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    index, _ = layer.route(hidden)
    pairs, middle = pairs_and_middle(layer.experts, hidden, index)
    torch.testing.assert_close(down_again(layer, middle, index), pairs, atol=1e-5, rtol=1e-4)


def basis_student(run: str) -> MoEModel:
    """A student whose experts are expanded from random bases, down included."""
    teacher = tiny("qwen3_moe")
    options = {"activation": "silu", "matrices": "gate+up+down", "run": run}
    spec = BankSpec("basis", 8, (), {"bases": 2, "rank": 4}, options)
    every = tuple(range(8))
    shapes = {"A": (8, 8, 4), "alpha": (8, 2), "B": (2, 4, 16)}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{i}.{m}.{part}": torch.randn(shape, generator=generator)
        for i in (0, 1)
        for m in ("gate", "up", "down")
        for part, shape in shapes.items()
    }
    layers = tuple(LayerPlan(i, every, every, "untouched", spec) for i in (0, 1))
    return apply_plan(teacher, Plan(layers, tensors=tensors))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("form", ["basis of all", "low_rank", "delta", "narrow", "quantized"])
@torch.no_grad()
def test_experts_that_compute_from_what_is_stored_hand_their_middle_out(form, implementation):
    teacher = tiny("qwen3_moe")
    student = apply_plan(teacher, forms.solved(teacher, form))
    student.model.set_experts_implementation(implementation)
    layer = student.layers[1]
    hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    index, _ = layer.route(hidden)
    pairs, middle = pairs_and_middle(layer.experts, hidden, index)
    torch.testing.assert_close(down_again(layer, middle, index), pairs, atol=1e-4, rtol=1e-3)
    collect(student, batches(), [MiddleEnergy()])


def test_gradients_of_experts_that_are_not_whole_are_refused() -> None:
    batch = [(tokens(2), torch.ones(2, 12, dtype=torch.bool))]
    with pytest.raises(InputError, match=r"of BasisExperts .*whole or run=materialised"):
        collect(basis_student("stored"), batch, [Fisher()])


def test_an_implementation_that_copies_weights_is_refused() -> None:
    model = tiny("qwen3_moe")
    model.model.set_experts_implementation("batched_mm")
    with pytest.raises(InputError, match="'batched_mm' cannot be measured: use `eager`"):
        collect(model, batches(), [MiddleMoment()])
