import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.solvers.rounding import inverse_root, round_to_nearest
from rerail.experts.quantized import Coded, dequantised
from rerail.methods.gptq import GPTQ
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Bits
from rerail.statistics.collect import collect
from rerail.statistics.moments import InputMoment, MiddleMoment
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, StatisticSet


def problem(n: int = 2, out: int = 24, inner: int = 64, seed: int = 0):
    """Return weights (n, out, in) and correlated inputs (n, tokens, in)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, inner, inner, generator=generator) * 0.3 + torch.eye(inner)
    x = torch.randn(n, 400, inner, generator=generator) @ mix
    return torch.randn(n, out, inner, generator=generator), x


def output_error(coded: Coded, group: int, weights: torch.Tensor, x: torch.Tensor) -> float:
    change = dequantised(coded, group) - weights
    return float((x @ change.mT).norm() / (x @ weights.mT).norm())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_outputs_are_closer_than_round_to_nearest_and_full_updates_help(bits: int) -> None:
    weights, x = problem(inner=256)
    h = (x.mT @ x).double()
    errors = [
        output_error(GPTQ(inner=inner, group=64).encode(weights, h, bits), 64, weights, x)
        for inner in ("full", "blocks")
    ]
    nearest = output_error(round_to_nearest(weights, bits, 64), 64, weights, x)
    assert errors[0] < 0.97 * nearest
    assert errors[0] == errors[1] if bits > 3 else errors[0] < errors[1]


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_uncorrelated_inputs_give_round_to_nearest(bits: int, scale: float) -> None:
    weights, _ = problem(inner=40)
    h = scale * torch.eye(40, dtype=torch.float64).repeat(2, 1, 1)
    found, expected = GPTQ(group=16).encode(weights, h, bits), round_to_nearest(weights, bits, 16)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("group", [5, 16, 64, 128])
def test_blocks_change_nothing_against_updates_one_column_at_a_time(group: int) -> None:
    weights, x = problem(n=1, out=6, inner=48)
    h = (x.mT @ x).double()
    root, _ = inverse_root(h, 0.01)
    w, made = weights.clone(), torch.empty_like(weights)
    for i in range(48):
        if i % group == 0:
            _, scale, zero = round_to_nearest(w[..., i : i + group], 3, group)
        code = (w[..., i] / scale[..., 0] + zero[..., 0]).round().clamp(0, 7)
        made[..., i] = (code - zero[..., 0]) * scale[..., 0]
        error = (w[..., i] - made[..., i]) / root[0, i, i]
        w[..., i + 1 :] -= error.unsqueeze(-1) * root[0, i, i + 1 :]
    found = dequantised(GPTQ(group=group).encode(weights, h, 3), group)
    torch.testing.assert_close(found, made)


def test_the_root_is_upper_and_of_the_inverse() -> None:
    _, x = problem(inner=12)
    h = (x.mT @ x).double()
    root, dead = inverse_root(h, 0.01)
    mean = h.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    inverse = torch.linalg.inv(h / mean + 0.01 * torch.eye(12, dtype=torch.float64))
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root.mT.double() @ root.double(), inverse, rtol=1e-5, atol=1e-6)
    assert not dead.any()


def test_a_dead_input_loses_its_column_and_nothing_else() -> None:
    weights, x = problem(inner=16)
    x[0, :, 5] = 0
    found = dequantised(GPTQ(group=16).encode(weights, (x.mT @ x).double(), 8), 16)
    assert (found[0, :, 5] == 0).all()
    assert (found[1, :, 5] != 0).any()
    assert (
        output_error(GPTQ(group=16).encode(weights, (x.mT @ x).double(), 8), 16, weights, x) < 0.02
    )


@pytest.mark.parametrize("percdamp", [0.0, 0.01])
def test_singular_moments_stay_finite_and_do_not_touch_their_neighbours(percdamp: float) -> None:
    weights, x = problem(inner=16)
    h = (x.mT @ x).double()
    alone = GPTQ(percdamp=percdamp).encode(weights[1:], h[1:], 2)
    h[0] = torch.ones(16, 16)
    both = GPTQ(percdamp=percdamp).encode(weights, h, 2)
    assert torch.isfinite(dequantised(both, 128)).all()
    assert torch.equal(both.codes[1], alone.codes[0])


def scarce(count: list[int]) -> tuple[LayerStatistics, torch.Tensor]:
    x = torch.randn(8, 200, 16, generator=torch.Generator().manual_seed(0)).double()
    h = torch.stack([a[:n].mT @ a[:n] for a, n in zip(x, count, strict=True)])
    held = {"count": torch.tensor(count), "input_moment": h, "middle_moment_g0": h[:, :8, :8]}
    return LayerStatistics(held, GPTQ().requires), h


def test_few_tokens_are_damped_more_and_none_are_rounded_to_nearest() -> None:
    layer, count = tiny("qwen3_moe").layers[0], [200, 64, 63, 33, 31, 3, 1, 0]
    statistics, h = scarce(count)
    method = GPTQ(group=16, least=2)
    everyone = torch.arange(8)
    found = {name: of(everyone) for name, of in method.moments(layer, statistics).items()}
    assert torch.equal(found["gate"], found["up"])
    few = method.moments(layer, statistics)["down"](torch.tensor([5, 2]))
    assert torch.equal(few, found["down"][[5, 2]])
    for e, n in enumerate(count):
        more = 0.09 * h[e].diagonal().mean() if n < 64 else 0.0
        expected = (h[e] + more * torch.eye(16)) * (n >= 2)
        torch.testing.assert_close(found["gate"][e], expected)
        down = h[e, :8, :8]
        more = 0.09 * down.diagonal().mean() if n < 32 else 0.0
        torch.testing.assert_close(found["down"][e], (down + more * torch.eye(8)) * (n >= 2))
    gate = layer.stack().gate
    made, nearest = method.encode(gate, found["gate"], 2), round_to_nearest(gate, 2, 16)
    assert torch.equal(made.codes[6:], nearest.codes[6:])
    assert not torch.equal(made.codes[:5], nearest.codes[:5])
    assert method.remarks(layer, statistics) == (
        "experts [6, 7] had fewer than 2 calibration tokens and were rounded to nearest",
        "experts [2, 3, 4, 5] had fewer than 64 calibration tokens and were damped more",
    )


def test_the_plan_uses_each_matrixs_own_inputs_and_says_who_was_rounded() -> None:
    teacher, ids = tiny("lfm2_moe"), tokens(2, 12)
    method = GPTQ(group=8)
    valid = torch.ones_like(ids, dtype=torch.bool)
    filled = collect(teacher, [(ids, valid)], method.requires)
    plan = make_plan(method, teacher.layers, filled, Bits(2), Uniform())
    tensors = filled.tensors[0]
    never = (tensors[Count().name] == 0).nonzero().flatten().tolist()
    assert never
    assert any(f"experts {never} had fewer than 1" in note for note in plan.lineage["notes"])
    assert all(torch.isfinite(t).all() for t in plan.tensors.values() if t.is_floating_point())
    student = apply_plan(teacher, plan).layers[0].stack()
    view = LayerStatistics(tensors, method.requires)
    for name, moments_of in method.moments(teacher.layers[0], view).items():
        moment = moments_of(torch.arange(teacher.layers[0].num_experts))
        raw = MiddleMoment() if name == "down" else InputMoment()
        assert moment.shape == tensors[raw.name].shape
        weights = getattr(teacher.layers[0].stack(), name)
        expected = dequantised(method.encode(weights, moment, 2), 8)
        torch.testing.assert_close(getattr(student, name), expected)


def test_two_runs_are_equal() -> None:
    weights, x = problem()
    h = (x.mT @ x).double()
    first, second = GPTQ().encode(weights, h, 3), GPTQ().encode(weights, h, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert StatisticSet().tensors == {}
