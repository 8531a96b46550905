import dataclasses

import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.solvers.bit_allocation import allocate_bits, block_errors
from rerail.errors import InputError, OutOfReach
from rerail.methods.gptq import GPTQ
from rerail.methods.hqq import HQQ
from rerail.methods.pmq import PMQ
from rerail.methods.rtn import RTN
from rerail.moe.model import MoEModel
from rerail.plan.allocation import PerLayer, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Bits
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect
from rerail.statistics.token_sample import TokenSample

METHOD = PMQ(quantiser=RTN(group=8), rows=64)


def plan_of(method: PMQ, model: MoEModel, average: float, ids: torch.Tensor | None = None) -> Plan:
    ids = tokens(6, 16) if ids is None else ids
    filled = collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], method.requires)
    return make_plan(method, model.layers, filled, Bits(average), Uniform())


def bits_in(plan: Plan, layer: int = 0) -> tuple[int, ...]:
    return plan.layers[layer].bank.integers["bits"]


def test_costs_are_the_formula_of_either_source() -> None:
    count, mass = torch.tensor([4, 0, 8]), torch.tensor([1.0, 0.0, 2.5])
    error = torch.tensor([[3.0, 1.0], [2.0, 1.0], [0.5, 0.25]])
    paper = METHOD.cost(count, mass, error, 2)  # 12 choices of two slots are 6 tokens
    torch.testing.assert_close(paper[0, 0].item(), 4 / 6 * (1 / 6) * 9)
    torch.testing.assert_close(paper[2, 1].item(), 8 / 6 * (2.5 / 6) * 0.0625)
    repo = dataclasses.replace(METHOD, exponents="repo").cost(count, mass, error, 2)
    torch.testing.assert_close(repo[0, 0].item(), 4 / 6 * (1 / 6) ** 1.5 * 3)
    assert (paper[1] == 0).all()
    assert paper.dtype == torch.float64


@pytest.mark.parametrize("mass", ["router", "gates"])
def test_bits_solve_the_program_of_the_measured_costs(mass: str) -> None:
    model, method = tiny("qwen3_moe"), dataclasses.replace(METHOD, mass=mass)
    ids = tokens(6, 16)
    filled = collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], method.requires)
    plan = make_plan(method, model.layers, filled, Bits(1.75), Uniform())
    for layer in model.layers:
        held = filled.tensors[layer.index]
        error = block_errors(layer, TokenSample.hidden(held["token_sample_64"]), (1, 2, 3), 8)
        raw = held["router_mass" if mass == "router" else "moment_g1_n0"]
        cost = (held["count"] * raw).unsqueeze(1) * error.square()
        found = bits_in(plan, layer.index)
        assert found == allocate_bits(cost, (1, 2, 3), 14, [0, 1, 1])
        assert sum(found) == 14
        assert len(set(found)) == 3


def test_experts_are_encoded_by_the_chosen_quantiser_at_their_bits() -> None:
    model = tiny("gpt_oss")
    for quantiser in (RTN(group=8), HQQ(group=8), GPTQ(group=8)):
        method = dataclasses.replace(METHOD, quantiser=quantiser)
        assert set(quantiser.requires) <= set(method.requires)
        plan = plan_of(method, model, 2)
        student = apply_plan(model, plan).layers[0]
        assert torch.isfinite(student.stack().gate).all()
        if quantiser.requires:
            continue
        for e, bits in enumerate(bits_in(plan)):
            coded = quantiser.encode(model.layers[0].stack().up[e : e + 1], None, bits)
            codes = coded.codes[0].float()
            scale, zero = (t[0].repeat_interleave(8, -1) for t in coded[1:])
            torch.testing.assert_close(student.expert(e).up, (codes - zero) * scale)


def test_a_never_routed_expert_gets_the_fewest_bits() -> None:
    model, ids = tiny("lfm2_moe"), tokens(2, 12)
    method = dataclasses.replace(METHOD, min_counts=(0, 0, 0))
    filled = collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], method.requires)
    plan = plan_of(method, model, 2, ids)
    never = (filled.tensors[0]["count"] == 0).nonzero().flatten().tolist()
    assert never
    assert all(bits_in(plan)[e] == 1 for e in never)
    assert sum(bits_in(plan)) <= 16


def test_the_ends_of_the_interval_are_one_width_for_all() -> None:
    free = dataclasses.replace(METHOD, min_counts=(0, 0, 0))
    model = tiny("qwen3_moe")
    assert bits_in(plan_of(free, model, 1)) == (1,) * 8
    assert bits_in(plan_of(free, model, 3)) == (3,) * 8
    forced = bits_in(plan_of(METHOD, model, 3))
    assert sorted(forced) == [2] + [3] * 7


def test_the_papers_counts_hold_up_to_sixteen_experts() -> None:
    assert METHOD.least(8) == METHOD.least(16) == [0, 1, 1]
    assert METHOD.least(17) == [0, 0, 0]
    assert PMQ(quantiser=RTN(), bits=(2, 3, 4)).least(8) == [0, 0, 0]
    assert dataclasses.replace(METHOD, min_counts=(2, 0, 1)).least(64) == [2, 0, 1]


def test_what_cannot_be_reached_says_why() -> None:
    layers = tiny("qwen3_moe").layers
    METHOD.check(layers, Bits(1.375), Uniform())
    for average in (1.3, 4):
        with pytest.raises(OutOfReach, match=rf"PMQ cannot reach {average} .* 1\.375 to 3"):
            METHOD.check(layers, Bits(average), Uniform())
    crowded = dataclasses.replace(METHOD, min_counts=(4, 4, 4))
    with pytest.raises(OutOfReach, match=r"at least \[4, 4, 4\] of 8 experts"):
        crowded.check(layers, Bits(2), Uniform())
    with pytest.raises(OutOfReach, match="use allocation=uniform"):
        METHOD.check(layers, Bits(2), PerLayer((4, 4)))


@pytest.mark.parametrize("bits", [(), (3, 2), (2, 2), (2, 5)])
def test_candidates_are_widths_that_are_packed(bits: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="must be ascending and out of"):
        PMQ(quantiser=RTN(), bits=bits)


@pytest.mark.parametrize("counts", [(1, 1), (0, -1, 0), (1, 0, 0, 0)])
def test_counts_go_with_the_candidates(counts: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="must be one count for each of"):
        PMQ(quantiser=RTN(), min_counts=counts)
