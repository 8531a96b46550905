import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.solvers.grouping import shares_in_group
from rerail.compress.solvers.least_squares import (
    channel_activations,
    normal_equations,
    ridge_solution,
)
from rerail.errors import InputError
from rerail.methods.merge_moe import MergeMoE
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.allocation import PerLayer, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect
from rerail.statistics.routed import Count
from rerail.statistics.statistic import StatisticSet
from rerail.statistics.token_sample import TokenSample

FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss"]
COUNTS = torch.tensor([9, 8, 3, 0, 2, 1, 0, 1])


def teacher_of(family: str) -> MoEModel:
    model = tiny(family)
    model.model.set_experts_implementation("eager")
    return model


def inputs(count: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def held(teacher: MoEModel, x: torch.Tensor, method: MergeMoE) -> StatisticSet:
    rows = torch.cat([torch.zeros(len(x), 2), x], dim=1)
    both = {Count().name: COUNTS, TokenSample(method.inputs).name: rows}
    return StatisticSet({layer.index: both for layer in teacher.layers})


def plan_of(teacher: MoEModel, method: MergeMoE, x: torch.Tensor, removed: float = 0.75) -> Plan:
    return make_plan(method, teacher.layers, held(teacher, x, method), Ratio(removed), Uniform())


def answers(layer: MoELayer, x: torch.Tensor, slot: int) -> torch.Tensor:
    return layer.run(x, torch.full((len(x), 1), slot), torch.ones(len(x), 1))


def residual(teacher: MoEModel, plan: Plan, x: torch.Tensor, weight: list[torch.Tensor]) -> float:
    """Return how far merged experts are from their members' weighted outputs, over both layers."""
    student, total = apply_plan(teacher, plan), 0.0
    for old, new, part in zip(teacher.layers, student.layers, plan.layers, strict=True):
        labels = torch.tensor(part.slots)
        share = shares_in_group(labels, COUNTS)
        for c in range(part.bank.stored):
            members = torch.nonzero(labels == c).flatten().tolist()
            target = sum(share[e] * answers(old, x, e).double() for e in members)
            found = answers(new, x, members[0]).double()
            total += float(((target - found) * weight[part.layer][:, [c]]).square().sum())
    return total


def ones(x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.ones(len(x), 8)] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_and_sums_are_those_of_the_definition(family: str) -> None:
    teacher, x = teacher_of(family), inputs(1100).double()
    layer = teacher.layers[0]
    stacks = {n: p.detach().double() for n, p in expert_parameters(layer.experts).items()}
    expert = {n: t[4:5] for n, t in stacks.items()}
    p = channel_activations(layer, expert, x)
    assert p.shape == (1100, layer.intermediate_size)
    down = layer.expert(4).down.double()
    bias = stacks["down_proj_bias"][4] if "down_proj_bias" in stacks else 0
    whole = layer.run(x, torch.full((1100, 1), 4), torch.ones(1100, 1).double(), **stacks)
    torch.testing.assert_close(p @ down.mT + bias, whole, rtol=0, atol=1e-12)
    members, share, scale = torch.tensor([0, 4, 5]), torch.tensor([0.5, 0.2, 0.3]), x[:, 0].abs()
    gram, cross = normal_equations(layer, members, share, expert, x, scale)
    zero = {n: torch.zeros_like(t) if n == "down_proj_bias" else t for n, t in stacks.items()}
    y = sum(
        b * layer.run(x, torch.full((1100, 1), e), torch.ones(1100, 1).double(), **zero)
        for e, b in zip(members.tolist(), share.tolist(), strict=True)
    )
    scaled_p, scaled_y = p * scale.unsqueeze(1), y * scale.unsqueeze(1)
    torch.testing.assert_close(gram, scaled_p.mT @ scaled_p)
    torch.testing.assert_close(cross, scaled_y.mT @ scaled_p, rtol=1e-6, atol=1e-6)


def random_problem(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    p = torch.randn(8, count, generator=generator, dtype=torch.float64)
    y = torch.randn(5, count, generator=generator, dtype=torch.float64)
    return p, y, torch.randn(5, 8, generator=generator, dtype=torch.float64)


def test_without_a_ridge_the_solution_is_least_squares() -> None:
    p, y, average = random_problem(30)
    found = ridge_solution(p @ p.mT, y @ p.mT, average, 0.0)
    torch.testing.assert_close(found, y @ torch.linalg.pinv(p), rtol=1e-8, atol=1e-8)
    left = (y - found @ p) @ p.mT
    assert left.norm() <= 1e-10 * y.norm() * p.norm()
    best = float((y - found @ p).norm())
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        other = found + 0.01 * torch.randn(5, 8, generator=generator, dtype=torch.float64)
        assert float((y - other @ p).norm()) > best


def test_the_ridge_goes_from_least_squares_to_the_average() -> None:
    p, y, average = random_problem(30)
    fits = [ridge_solution(p @ p.mT, y @ p.mT, average, r) for r in (0, 0.01, 0.1, 1, 10, 1e9)]
    errors = [float((y - w @ p).norm()) for w in fits]
    assert errors == sorted(errors)
    assert errors[0] < errors[2] < errors[4] < float((y - average @ p).norm())
    torch.testing.assert_close(fits[-1], average, rtol=0, atol=1e-6)
    level = 0.1 * (p @ p.mT).diagonal().mean() * torch.eye(8, dtype=torch.float64)
    expected = (y @ p.mT + average @ level) @ torch.linalg.inv(p @ p.mT + level)
    torch.testing.assert_close(fits[2], expected)


def test_what_no_input_excites_keeps_the_average() -> None:
    p, y, average = random_problem(30)
    p[3] = 0
    for ridge in (0.0, 0.1):
        found = ridge_solution(p @ p.mT, y @ p.mT, average, ridge)
        torch.testing.assert_close(found[:, 3], average[:, 3])
        assert not torch.allclose(found[:, 2], average[:, 2])
    nothing = torch.zeros(8, 8, dtype=torch.float64)
    assert torch.equal(ridge_solution(nothing, nothing[:5], average, 0.1), average)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_and_up_are_frequency_averages_and_down_is_fitted(family: str) -> None:
    teacher, x = teacher_of(family), inputs()
    plan = plan_of(teacher, MergeMoE(ridge=0), x)
    for part, layer in zip(plan.layers, teacher.layers, strict=True):
        labels = torch.tensor(part.slots)
        assert part.slots[:2] == (0, 1)
        share = shares_in_group(labels, COUNTS)
        for name, parameter in expert_parameters(layer.experts).items():
            found = plan.tensors[f"layers.{layer.index}.{name}"]
            for c in range(2):
                weight = (share * (labels == c)).float()
                mean = torch.einsum("e,e...->...", weight, parameter)
                assert torch.allclose(found[c], mean, atol=1e-6) is (name != "down_proj")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fit_beats_the_average_and_its_best_multiple_on_its_inputs(family: str) -> None:
    teacher, x = teacher_of(family), inputs()
    fits = [residual(teacher, plan_of(teacher, MergeMoE(ridge=r), x), x, ones(x)) for r in (0, 0.1)]
    average = plan_of(teacher, MergeMoE(ridge=1e9), x)
    scaled = []
    for scale in torch.linspace(0.4, 1.6, 13).tolist():
        tensors = {n: t * scale if "down_proj" in n else t for n, t in average.tensors.items()}
        changed = Plan(average.layers, {}, tensors)
        scaled.append(residual(teacher, changed, x, ones(x)))
    assert fits[0] < fits[1] < residual(teacher, average, x, ones(x))
    assert fits[0] < min(scaled)


def test_few_inputs_are_noted_with_a_ridge_and_refused_without() -> None:
    teacher, x = teacher_of("mixtral"), inputs(count=10)
    plan = plan_of(teacher, MergeMoE(), x)
    notes = plan.lineage["notes"]
    assert len(notes) == 2
    assert "layer 0: 2 of 2 least squares fits have fewer than 24 inputs (fewest: 10)" in notes[0]
    average = plan_of(teacher, MergeMoE(ridge=1e9), x)
    assert residual(teacher, plan, x, ones(x)) < residual(teacher, average, x, ones(x))
    assert "notes" not in plan_of(teacher, MergeMoE(), inputs(24)).lineage
    with pytest.raises(InputError, match=r"fewer than 24 inputs .* compressor.inputs of 24"):
        plan_of(teacher, MergeMoE(ridge=0), x)
    with pytest.raises(InputError, match="fewer than 24 inputs"):
        MergeMoE(ridge=0, inputs=23).check(teacher.layers, Ratio(0.5), Uniform())
    with pytest.raises(InputError, match="0 or more"):
        MergeMoE(ridge=-0.1).check(teacher.layers, Ratio(0.5), Uniform())
    MergeMoE(ridge=0, inputs=24).check(teacher.layers, Ratio(0.5), Uniform())


def test_a_fit_may_read_the_tokens_of_its_members_only() -> None:
    teacher, x = teacher_of("qwen3_moe"), inputs(400)
    found = {}
    for tokens_of in ("all", "routed", "gated"):
        found[tokens_of] = plan_of(teacher, MergeMoE(ridge=0, tokens=tokens_of), x)
    weights: dict[str, list[torch.Tensor]] = {"all": ones(x), "routed": [], "gated": []}
    for part, layer in zip(found["all"].layers, teacher.layers, strict=True):
        index, gates = layer.route(x)
        labels = torch.tensor(part.slots)[index]
        gated = torch.stack([(gates * (labels == c)).sum(dim=1) for c in range(2)], dim=1)
        weights["gated"].append(gated)
        weights["routed"].append((gated > 0).float())
        for name, expected in weights.items():
            columns = MergeMoE(tokens=name).columns(layer, x, torch.tensor(part.slots))
            torch.testing.assert_close(columns, expected[-1][:, :2])
    for measure, weight in weights.items():
        errors = {name: residual(teacher, plan, x, weight) for name, plan in found.items()}
        assert min(errors, key=errors.get) == measure
        assert len({round(e, 6) for e in errors.values()}) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_identical_experts_stay_what_they_are(family: str) -> None:
    teacher = teacher_of(family)
    for layer in teacher.layers:
        for parameter in expert_parameters(layer.experts).values():
            parameter.data = parameter.data[[0, 1, 2, 3, 0, 1, 2, 3]]
    counts = torch.tensor([9, 8, 7, 6, 1, 1, 0, 1])
    method = MergeMoE(ridge=0)
    given = held(teacher, inputs(), method)
    for tensors in given.tensors.values():
        tensors[Count().name] = counts
    plan = make_plan(method, teacher.layers, given, Ratio(0.5), Uniform())
    assert all(part.slots == (0, 1, 2, 3, 0, 1, 2, 3) for part in plan.layers)
    for layer in teacher.layers:
        for name, parameter in expert_parameters(layer.experts).items():
            found = plan.tensors[f"layers.{layer.index}.{name}"]
            torch.testing.assert_close(found, parameter[:4], rtol=0, atol=1e-5)


def test_similarity_is_of_gate_and_up_weights() -> None:
    layer = tiny("gpt_oss").layers[0]
    gate, up, _ = layer.stack()
    flat = torch.cat([up, gate], dim=1).flatten(1).double()
    torch.testing.assert_close(
        MergeMoE().similarity(layer),
        torch.cosine_similarity(flat.unsqueeze(1), flat.unsqueeze(0), dim=-1),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(
        MergeMoE(similarity_of="l2").similarity(layer),
        -torch.cdist(flat, flat).square(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_layers_outside_the_range_are_left_alone() -> None:
    teacher = teacher_of("qwen3_moe")
    method = MergeMoE()
    given = held(teacher, inputs(), method)
    plan = make_plan(method, teacher.layers, given, Ratio(0.5), PerLayer((8, 4)))
    assert {name.split(".")[1] for name in plan.tensors} == {"1"}
    student = apply_plan(teacher, plan)
    before, after = (expert_parameters(m.layers[0].stock()) for m in (teacher, student))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unused_experts_and_unreached_groups_stay_finite() -> None:
    teacher, method = teacher_of("qwen3_moe"), MergeMoE(tokens="routed", inputs=64)
    given = collect(teacher, [(tokens(1, 3), torch.ones(1, 3).bool())], method.requires)
    assert (given.tensors[0]["count"] == 0).any()
    nothing = {
        i: {n: torch.zeros_like(t) if n == "count" else t[:0] for n, t in own.items()}
        for i, own in given.tensors.items()
    }
    for filled in (given, StatisticSet(nothing)):
        plan = make_plan(method, teacher.layers, filled, Ratio(0.5), Uniform())
        assert "fewest: " in plan.lineage["notes"][0]
        assert all((t.flatten(1).abs().sum(dim=1) > 0).all() for t in plan.tensors.values())
        assert torch.isfinite(apply_plan(teacher, plan).model(tokens()).logits).all()
