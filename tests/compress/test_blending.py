import pytest
import torch

from families import tiny
from rerail.compress.solvers.blending import blended, by_matrix, narrowed, used
from rerail.moe.fused_experts import ExpertWeights, expert_parameters


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_equal_weights_give_the_mean_and_a_lone_one_gives_its_expert() -> None:
    stack, even = draw(4, 3, 5), torch.ones(4)
    torch.testing.assert_close(blended(stack, even, None), stack.mean(dim=0))
    torch.testing.assert_close(blended(stack, even, torch.full((4, 3, 5), 7.0)), stack.mean(dim=0))
    lone = torch.zeros(4, 3, 5)
    lone[2] = 1e-30
    torch.testing.assert_close(blended(stack, even, lone), stack[2])
    shares = torch.tensor([1.0, 0.0, 3.0, 0.0])
    torch.testing.assert_close(blended(stack, shares, None), (stack[0] + 3 * stack[2]) / 4)


def test_every_entry_is_the_weighted_mean_and_lies_between_the_experts() -> None:
    stack, precision, share = draw(4, 3, 5), draw(4, 3, 5, seed=1).square(), torch.rand(4)
    found = blended(stack, share, precision)
    weight = share.view(-1, 1, 1) * precision
    torch.testing.assert_close(found, (weight * stack).sum(dim=0) / weight.sum(dim=0))
    assert (found >= stack.amin(dim=0) - 1e-6).all()
    assert (found <= stack.amax(dim=0) + 1e-6).all()


def test_entries_that_no_expert_weighs_fall_back_on_the_mean() -> None:
    stack, precision = draw(4, 3, 5), torch.zeros(4, 3, 5)
    precision[1, 0] = 2.0
    found = blended(stack, torch.ones(4), precision)
    torch.testing.assert_close(found[0], stack[1, 0])
    torch.testing.assert_close(found[1:], stack.mean(dim=0)[1:])
    assert found.dtype == torch.float32
    assert blended(stack.bfloat16(), torch.zeros(4), precision).dtype == torch.bfloat16


def test_shares_of_tokens() -> None:
    assert used(torch.tensor([1, 0, 3])).tolist() == [0.25, 0, 0.75]
    assert used(torch.zeros(4, dtype=torch.int64)).tolist() == [0.25] * 4


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "granitemoe"])
def test_flat_numbers_find_their_weights_in_every_layout(family: str) -> None:
    layer = tiny(family).layers[0]
    held = expert_parameters(layer.experts)
    flat = torch.cat([held[n].flatten(1) for n in ("gate_up_proj", "down_proj")], dim=1)
    for found, weight in zip(by_matrix(layer, flat), layer.stack(), strict=True):
        assert torch.equal(found, weight)


def test_narrowing_takes_the_same_channels_of_all_three() -> None:
    whole = ExpertWeights(draw(2, 6, 4), draw(2, 6, 4, seed=1), draw(2, 4, 6, seed=2))
    gate, up, down = narrowed(whole, [0, 3])
    assert torch.equal(gate, whole.gate[:, [0, 3]])
    assert torch.equal(up, whole.up[:, [0, 3]])
    assert torch.equal(down, whole.down[:, :, [0, 3]])
