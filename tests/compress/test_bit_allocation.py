import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from families import tiny
from rerail.compress.solvers.bit_allocation import allocate_bits, block_errors, least_sum
from rerail.compress.solvers.rounding import round_to_nearest
from rerail.errors import OutOfReach
from rerail.experts.quantized import dequantised
from rerail.moe.fused_experts import ExpertWeights, expert_parameters
from rerail.moe.model import MoELayer

BITS = (1, 2, 3)


def costs(experts: int, widths: int = 3, seed: int = 0) -> torch.Tensor:
    """Return random costs that fall with bits."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(experts, widths, generator=generator, dtype=torch.float64) + 1e-3
    return steps.flip(1).cumsum(1).flip(1)


def total(cost: torch.Tensor, found: tuple[int, ...], bits: tuple[int, ...] = BITS) -> float:
    return sum(float(cost[e, bits.index(b)]) for e, b in enumerate(found))


def brute(cost: torch.Tensor, bits: tuple[int, ...], budget: int, least: list[int]) -> float:
    options = itertools.product(bits, repeat=len(cost))
    fits = (
        c
        for c in options
        if sum(c) <= budget and all(c.count(b) >= n for b, n in zip(bits, least, strict=True))
    )
    return min((total(cost, c, bits) for c in fits), default=float("inf"))


@pytest.mark.parametrize("least", [[0, 0, 0], [0, 1, 1], [2, 0, 1]])
@pytest.mark.parametrize("bits", [(1, 2, 3), (2, 4, 8)])
def test_it_is_as_good_as_trying_everything(least: list[int], bits: tuple[int, ...]) -> None:
    for seed, budget in itertools.product(range(4), range(4, 6 * bits[-1] + 2, 3)):
        cost = costs(5, seed=seed)
        best = brute(cost, bits, budget, least)
        if best == float("inf"):
            with pytest.raises(OutOfReach, match="allowed sums: from"):
                allocate_bits(cost, bits, budget, least)
            continue
        found = allocate_bits(cost, bits, budget, least)
        assert sum(found) <= budget
        assert all(found.count(b) >= n for b, n in zip(bits, least, strict=True))
        assert total(cost, found, bits) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("least", [[0, 0, 0], [0, 3, 2]])
def test_it_is_as_good_as_an_integer_solver_on_128_experts(least: list[int]) -> None:
    n, budget, cost = 128, 250, costs(128, seed=3)
    one = np.kron(np.eye(n), np.ones(3))
    spend = np.tile(BITS, n)[None]
    count = np.tile(np.eye(3), n)
    rules = [
        LinearConstraint(one, 1, 1),
        LinearConstraint(spend, 0, budget),
        LinearConstraint(count, least, n),
    ]
    solved = milp(cost.flatten().numpy(), constraints=rules, bounds=Bounds(0, 1), integrality=1)
    found = allocate_bits(cost, BITS, budget, least)
    assert total(cost, found) == pytest.approx(solved.fun, abs=1e-9)


def test_more_bits_never_cost_more_and_the_ends_are_the_ends() -> None:
    cost = costs(8)
    values = [total(cost, allocate_bits(cost, BITS, budget)) for budget in range(8, 25)]
    assert values == sorted(values, reverse=True)
    assert allocate_bits(cost, BITS, 8) == (1,) * 8
    assert allocate_bits(cost, BITS, 24) == (3,) * 8
    assert all(sum(allocate_bits(cost, BITS, budget)) == budget for budget in range(8, 25))


def test_permuted_experts_get_permuted_bits_and_a_scale_changes_nothing() -> None:
    cost, order = costs(9), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    found = allocate_bits(cost, BITS, 17)
    assert allocate_bits(cost[order], BITS, 17) == tuple(found[i] for i in order.tolist())
    assert allocate_bits(cost * 1e-7, BITS, 17) == found


def test_an_expert_that_costs_nothing_gets_the_fewest_bits() -> None:
    cost = costs(6)
    cost[2] = 0
    assert allocate_bits(cost, BITS, 16)[2] == 1


def test_a_budget_for_the_widest_everywhere_is_spent_everywhere() -> None:
    cost = costs(6)
    cost[2] = 0
    assert allocate_bits(cost, BITS, 18) == (3,) * 6
    assert allocate_bits(cost, BITS, 18, [0, 1, 0]).count(2) == 1


def test_of_equal_costs_the_later_expert_has_fewer_bits() -> None:
    cost = torch.tensor([[1.0, 0.5, 0.2]]).repeat(2, 1)
    assert allocate_bits(cost, BITS, 5) == (3, 2)
    flat = torch.tensor([[1.0, 0.5, 0.5]]).repeat(2, 1)
    assert allocate_bits(flat, BITS, 5) == (2, 2)


def test_the_least_sum_is_the_edge_of_what_fits() -> None:
    assert least_sum(8, BITS, [0, 1, 1]) == 11
    assert sum(allocate_bits(costs(8), BITS, 11, [0, 1, 1])) == 11
    with pytest.raises(OutOfReach, match=r"10 bits cannot be shared by 8 experts .* from 11"):
        allocate_bits(costs(8), BITS, 10, [0, 1, 1])


def recomputed(layer: MoELayer, hidden: torch.Tensor, expert: int, bits: int) -> torch.Tensor:
    """Return the change of the block's routed output when one expert is rounded."""
    stacks = ExpertWeights(*(s.clone() for s in layer.stack()))
    for stack in stacks:
        part = stack[expert : expert + 1]
        part.copy_(dequantised(round_to_nearest(part, bits, 8), 8))
    swapped = layer.layout.pack(stacks)
    return layer.run(hidden, *layer.route(hidden), **swapped) - layer.answer(hidden)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_errors_are_those_of_the_block_computed_again(family: str) -> None:
    layer = tiny(family).layers[0]
    hidden = torch.randn(20, 16, generator=torch.Generator().manual_seed(2))
    before = {n: p.clone() for n, p in expert_parameters(layer.experts).items()}
    found = block_errors(layer, hidden, (1, 2, 3, 16), 8)
    by_batch = block_errors(layer, hidden, (1, 2, 3, 16), 8, batch=12)
    for e, (i, b) in itertools.product(range(8), enumerate(BITS)):
        change = recomputed(layer, hidden, e, b).double()
        torch.testing.assert_close(found[e, i], change.norm(), rtol=1e-4, atol=1e-6)
        norms = change[:12].norm() + change[12:].norm()
        torch.testing.assert_close(by_batch[e, i], norms, rtol=1e-4, atol=1e-6)
    assert (found[:, 3] == 0).all()
    assert found[:, 2].sum() < found[:, 1].sum() < found[:, 0].sum()
    assert all(torch.equal(p, before[n]) for n, p in expert_parameters(layer.experts).items())
