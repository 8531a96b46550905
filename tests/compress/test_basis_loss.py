import pytest
import torch

from rerail.compress.solvers import basis_loss as module
from rerail.compress.solvers.basis_loss import basis_loss
from rerail.experts.basis import ACTIVATIONS, mixed


def drawn() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (7, 5, 3), (7, 4), (4, 3, 6), (7, 5, 6)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def test_every_activation_of_the_form_has_a_slope() -> None:
    assert module.ACTIVATIONS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("piece", [1, 60, 1 << 20])
def test_the_loss_and_its_gradient_are_those_of_autograd(
    activation: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    *free, target = drawn()
    a, alpha, b = (t.requires_grad_() for t in free)
    expected = (mixed(a, alpha, b, activation) - target).square().sum()
    measured = basis_loss(a, alpha, b, target, activation)
    torch.testing.assert_close(measured, expected)
    grads = torch.autograd.grad(3 * expected, (a, alpha, b))
    for one, other in zip(torch.autograd.grad(3 * measured, (a, alpha, b)), grads, strict=True):
        torch.testing.assert_close(one, other)
