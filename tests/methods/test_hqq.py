import pytest
import torch

from rerail.compress.solvers.rounding import round_to_nearest
from rerail.experts.quantized import dequantised
from rerail.methods.hqq import HQQ
from rerail.methods.rtn import RTN


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_errors_on_normal_numbers_are_a_little_under_those_of_the_start(
    bits: int, size: float
) -> None:
    weights = size * normal(1, 256, 512)
    step = (
        weights.unflatten(-1, (8, 64)).amax(-1) - weights.unflatten(-1, (8, 64)).amin(-1)
    ).mean()
    uniform = step / (2**bits - 1) / 12**0.5 / size
    made = dequantised(HQQ().encode(weights, None, bits), 64)
    found = (made - weights).norm() / weights.norm()
    assert 0.9 * uniform < found < uniform


def test_refined_zeros_are_no_worse_than_the_start_in_any_group() -> None:
    weights = normal(2, 16, 128)
    errors = []
    for steps in (0, 1, 20):
        made = dequantised(HQQ(steps=steps).encode(weights, None, 3), 64)
        errors.append((made - weights).abs().unflatten(-1, (2, 64)).mean(-1))
    assert (errors[1] <= errors[0] + 1e-7).all()
    assert (errors[2] <= errors[1] + 1e-7).all()
    assert errors[2].mean() < 0.99 * errors[0].mean()


def test_one_step_is_the_formula() -> None:
    piece = normal(1, 4, 8)
    low, high = piece.amin(-1, keepdim=True), piece.amax(-1, keepdim=True)
    scale = (high - low) / 3
    zero = -low / scale
    codes = (piece / scale + zero).round().clamp(0, 3)
    rest = piece - (codes - zero) * scale
    shrunk = rest.sign() * (rest.abs() - rest.abs() ** -0.3 / 10).clamp(min=0)
    expected = (codes - (piece - shrunk) / scale).mean(-1, keepdim=True)
    start = rest.abs().mean(-1, keepdim=True)
    moved = (piece / scale + expected).round().clamp(0, 3)
    better = (piece - (moved - expected) * scale).abs().mean(-1, keepdim=True) < start
    found = HQQ(steps=1, group=8).encode(piece, None, 2)
    torch.testing.assert_close(found.scale, scale)
    torch.testing.assert_close(found.zero, torch.where(better, expected, zero))
    assert better.any()


def test_one_bit_is_left_to_sign_and_mean() -> None:
    weights = normal(1, 8, 64)
    found, expected = HQQ().encode(weights, None, 1), round_to_nearest(weights, 1, 64)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_mean_absolute_error_beats_round_to_nearest() -> None:
    weights = 0.02 * normal(1, 32, 128)
    for bits in (2, 3, 4):
        errors = [
            float((dequantised(m.encode(weights, None, bits), 64) - weights).abs().mean())
            for m in (HQQ(), RTN(group=64))
        ]
        assert errors[0] < errors[1]


def test_the_penalty_grows_by_kappa_each_step() -> None:
    weights = 3 * normal(1, 8, 64)
    zeros = [
        HQQ(steps=2, kappa=k).refined(weights, 3, torch.float32).zero for k in (1.0, 1.01, 5.0)
    ]
    assert not torch.equal(zeros[0], zeros[1])
    assert not torch.equal(zeros[0], zeros[2])
