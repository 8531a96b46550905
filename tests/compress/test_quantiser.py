import pytest
import torch

from families import CONFIGS, tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.solvers.rounding import round_to_nearest
from rerail.compress.templates.quantiser import Quantiser
from rerail.errors import InputError, OutOfReach
from rerail.experts.quantized import dequantised
from rerail.methods.hqq import HQQ
from rerail.methods.rtn import RTN
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoEModel
from rerail.plan.allocation import GlobalScore, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Bits, Ratio
from rerail.plan.plan import Plan
from rerail.plan.sizes import Sizes
from rerail.statistics.statistic import StatisticSet


def stack(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape or (3, 6, 20), generator=torch.Generator().manual_seed(seed))


def gap(weights: torch.Tensor, method: Quantiser, bits: int) -> float:
    made = dequantised(method.encode(weights, None, bits), method.group)
    return float((made - weights).norm() / weights.norm())


def plan_of(method: Quantiser, model: MoEModel, average: float) -> Plan:
    return make_plan(method, model.layers, StatisticSet(), Bits(average), Uniform())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_nearest_points_of_a_grid_from_least_to_greatest(bits: int) -> None:
    weights = stack()
    codes, scale, zero = round_to_nearest(weights, bits, 8)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) == 2**bits - 1
    assert scale.shape == zero.shape == (3, 6, 3)
    assert torch.equal(zero, zero.round())
    made = dequantised(round_to_nearest(weights, bits, 8), 8)
    for g, piece in enumerate(weights.split(8, dim=-1)):
        low, high = piece.amin(-1).clamp(max=0), piece.amax(-1).clamp(min=0)
        expected = (high - low) / (2**bits - 1)
        torch.testing.assert_close(scale[..., g], expected)
        off = (made.split(8, dim=-1)[g] - piece).abs()
        assert (off <= scale[..., g : g + 1] * 1.0001).all()
        assert (off <= scale[..., g : g + 1] * 0.5001).float().mean() > 0.9


def test_one_bit_is_the_sign_times_the_mean_of_each_group() -> None:
    weights = stack()
    made = dequantised(round_to_nearest(weights, 1, 8), 8)
    for piece, found in zip(weights.split(8, -1), made.split(8, -1), strict=True):
        torch.testing.assert_close(found, piece.sign() * piece.abs().mean(-1, keepdim=True))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_on_the_grid_stays_there(bits: int, dtype: torch.dtype) -> None:
    weights = stack(2, 5, 16).to(dtype)
    once = dequantised(round_to_nearest(weights, bits, 8), 8)
    twice = dequantised(round_to_nearest(once.to(dtype), bits, 8), 8)
    torch.testing.assert_close(twice, once, rtol=0, atol=float(once.abs().max()) * 2**-7)


@pytest.mark.parametrize("method", [RTN(group=8), HQQ(group=8)])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 3e-4, 900.0])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_constant_group_comes_back(method: Quantiser, value: float, bits: int) -> None:
    weights = torch.full((1, 2, 16), value)
    weights[0, 1] = torch.linspace(-1, 1, 16)
    for dtype in (torch.float32, torch.float16):
        made = dequantised(method.encode(weights.to(dtype), None, bits), 8)
        assert torch.isfinite(made).all()
        torch.testing.assert_close(made[0, 0], weights[0, 0], rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("method", [RTN(group=8), HQQ(group=8)])
def test_error_falls_with_bits(method: Quantiser) -> None:
    gaps = [gap(stack(), method, bits) for bits in (1, 2, 3, 4, 8)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.01
    assert gaps[0] < 0.7


def test_scales_are_rounded_before_codes_are_chosen() -> None:
    weights = stack().to(torch.bfloat16)
    codes, scale, zero = round_to_nearest(weights, 8, 20)
    assert scale.dtype == zero.dtype == torch.bfloat16
    best = (weights.float() / scale.float() + zero.float()).round().clamp(0, 255)
    assert torch.equal(codes.float(), best)


@pytest.mark.parametrize("family", CONFIGS)
def test_eight_bits_are_close_and_touch_matrices_only(family: str) -> None:
    teacher = tiny(family)
    before = {n: p.clone() for n, p in teacher.model.named_parameters()}
    student = apply_plan(teacher, plan_of(RTN(group=8), teacher, 8))
    with torch.no_grad():
        spoken = [m.model(tokens()).logits.log_softmax(-1) for m in (teacher, student)]
    kl = (spoken[0].exp() * (spoken[0] - spoken[1])).sum(-1).mean()
    assert 0 < kl < 1e-2
    assert all(torch.equal(p, before[n]) for n, p in teacher.model.named_parameters())
    for old, new in zip(teacher.layers, student.layers, strict=True):
        assert new.router_rows is old.router_rows
        shell = expert_parameters(new.experts.shell)
        for name, parameter in expert_parameters(old.experts).items():
            assert (shell.get(name) is parameter) is (name not in ("gate_up_proj", "down_proj"))


def test_notes_say_what_a_number_takes_and_sizes_agree() -> None:
    teacher = tiny("qwen3_moe")
    plan = plan_of(RTN(group=8), teacher, 3)
    # 3 bits, and 16 + 16 bits for each 8 numbers
    assert plan.lineage["notes"][0] == ("layer 0: 3 bits a number, 7 with scales and zeros of 16")
    removed = Sizes.predicted(teacher, plan, 2).removed_of_experts(Sizes.of(teacher, 2))
    assert plan.lineage["achieved"] == pytest.approx(1 - 7 / 16) == removed
    assert plan.lineage["removed"] == 1 - 3 / 16


def test_matrices_encoded_in_parts_are_those_encoded_at_once(monkeypatch) -> None:
    teacher = tiny("qwen3_moe")
    whole = plan_of(HQQ(group=8), teacher, 3).tensors
    monkeypatch.setattr("rerail.compress.templates.quantiser._AT_ONCE", 300)
    parts = plan_of(HQQ(group=8), teacher, 3).tensors
    assert whole.keys() == parts.keys()
    assert all(torch.equal(t, parts[n]) for n, t in whole.items())


def test_a_student_that_decodes_answers_as_the_materialised_one() -> None:
    teacher = tiny("mixtral")
    students = [
        apply_plan(teacher, plan_of(RTN(run=run), teacher, 4)) for run in ("stored", "materialised")
    ]
    with torch.no_grad():
        first, second = (s.model(tokens()).logits for s in students)
    assert torch.equal(first, second)
    assert not students[0].layers[0].experts.materialised


@pytest.mark.parametrize("average", [1.5, 2.5, 5, 7, 12])
def test_one_width_for_all_must_be_one_that_is_packed(average: float) -> None:
    with pytest.raises(OutOfReach, match=f"RTN cannot reach an average of {average} bits"):
        RTN().check(tiny("qwen3_moe").layers, Bits(average), Uniform())


def test_ratios_and_other_allocations_are_refused() -> None:
    layers = tiny("qwen3_moe").layers
    with pytest.raises(OutOfReach, match="swept by bits"):
        RTN().check(layers, Ratio(0.5), Uniform())
    with pytest.raises(OutOfReach, match="keeps them all; use allocation=uniform"):
        RTN().check(layers, Bits(4), GlobalScore())
    with pytest.raises(InputError, match=r"compressor\.group=0"):
        RTN(group=0)
