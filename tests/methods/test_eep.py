"""EEP: evolution of kept sets and of what kept experts are made of, whole students judged."""

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.solvers.evolution import (
    Evolution,
    Genome,
    kept_of,
    one_hot,
    removals_of,
    removed_of,
    varied_matrices,
    varied_sets,
)
from rerail.errors import InputError, OutOfReach
from rerail.evaluate.fitness import plan_fitness
from rerail.methods.eep import EEP
from rerail.methods.reap import MomentScore
from rerail.moe.model import MoEModel
from rerail.plan.allocation import GlobalScore, PerLayer, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.plan.search import Search
from rerail.statistics.collect import collect
from rerail.statistics.routed import Count
from rerail.statistics.statistic import StatisticSet
from students import blocks

SMALL = EEP(population=4, iterations=8, groups=2)
IDS = tokens(2, 12, seed=5)


def counted(teacher: MoEModel) -> StatisticSet:
    text = blocks()
    return collect(teacher, list(text.batches(8)), [Count()])


def plan_of(teacher: MoEModel, method: EEP, fitness: object = None, removed: float = 0.5) -> Plan:
    text = blocks(8)
    fitness = fitness or plan_fitness(teacher, text, method.measure, 8, list)
    layers = teacher.layers
    return make_plan(method, layers, counted(teacher), Ratio(removed), Uniform(), fitness=fitness)


def judged(method: EEP, seed: int = 0) -> tuple[Plan, list[float]]:
    """Return the plan under a fitness without any order, and all that was answered."""
    values: list[float] = []

    def fitness(plan: Plan) -> float:
        values.append(random.Random(f"{seed} {plan.fingerprint()}").random())
        return values[-1]

    return plan_of(tiny("qwen3_moe"), method, fitness), values


def hidden(model: MoEModel) -> torch.Tensor:
    with torch.no_grad():
        return model.hidden(IDS)


# ---- evolution


def evolution(fitness: object) -> Evolution:
    return Evolution(fitness, 0.3, 0.6, random.Random(0))


def pools(count: int = 2, groups: int = 1) -> list:
    layer = tiny("deepseek_v3" if groups > 1 else "qwen3_moe").layers[0]
    generator = torch.Generator().manual_seed(0)
    return [removals_of(layer, (0, 1, 4, 5), generator) for _ in range(count)]


def test_the_best_set_is_found_where_one_is_better_than_all_others() -> None:
    target, pair = [{0, 2, 5, 7}, {1, 2, 3, 6}], pools()

    def fitness(genome: Genome) -> float:
        sets = kept_of(genome)
        return float(sum(len(t & set(s)) for t, s in zip(target, sets, strict=True)))

    found = evolution(fitness)
    found.judge([tuple(pool.random(1)[0] for pool in pair)])
    found.run(lambda *parents: varied_sets(pair, *parents, 0.5), 400)
    assert [set(own) for own in kept_of(found.best)] == target


def test_the_best_so_far_never_falls_and_nothing_is_judged_twice() -> None:
    asked, pair = [], pools()

    def fitness(genome: Genome) -> float:
        asked.append(kept_of(genome))
        return random.Random(str(kept_of(genome))).random()

    found, best = evolution(fitness), []
    found.judge([tuple(pool.random(1)[0] for pool in pair)])
    for _ in range(40):
        found.run(lambda *parents: varied_sets(pair, *parents, 0.3), 1)
        best.append(found.summary()["best"])
    assert best == sorted(best)
    assert best[-1] > best[0]
    assert len({str(a) for a in asked}) == len(asked) == 41 == len(found.judged)


def test_a_search_ends_where_nothing_new_can_be_bred() -> None:
    found = evolution(lambda genome: 0.0)
    start = (torch.zeros(3, dtype=torch.bool),)
    found.judge([start])
    found.run(lambda first, second: first, 5)
    assert len(found.judged) == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_children_keep_as_many_in_every_router_group(groups: int) -> None:
    pair = pools(groups=groups)
    parents = [tuple(pool.random(1)[0] for pool in pair) for _ in range(6)]
    for first in parents:
        for second in parents:
            for own in varied_sets(pair, first, second, 1.0):
                assert own.view(groups, -1).sum(dim=1).tolist() == [4 // groups] * groups


def test_sets_and_their_rows_are_inverse_to_each_other() -> None:
    sets = [(0, 2, 5, 7), (1, 2, 3, 6)]
    assert kept_of(removed_of(pools(), sets)) == sets
    for matrix, own in zip(one_hot(pools(), sets), sets, strict=True):
        assert torch.equal(matrix, torch.eye(8, dtype=torch.float64)[list(own)])


def test_matrices_move_by_the_scale_at_the_probability_and_rows_may_be_normalised() -> None:
    generator = torch.Generator().manual_seed(0)
    parent = (torch.ones(200, 50, dtype=torch.float64),)
    [child] = varied_matrices(parent, parent, generator, 0.25, 0.065, 0.0)
    moved = (child - 1)[child != 1]
    assert moved.numel() / child.numel() == pytest.approx(0.25, abs=0.02)
    assert float(moved.std()) == pytest.approx(0.065, rel=0.05)
    [normal] = varied_matrices(parent, parent, generator, 0.25, 0.065, 1.0)
    torch.testing.assert_close(normal.sum(dim=1), torch.ones(200, dtype=torch.float64))
    other = (torch.zeros(200, 50, dtype=torch.float64),)
    picked = {
        float(varied_matrices(parent, other, generator, 0.0, 1.0, 0.0)[0].max()) for _ in range(20)
    }
    assert picked == {0.0, 1.0}


# ---- the method


def test_the_first_set_is_the_most_used_one_and_the_result_is_never_worse() -> None:
    teacher = tiny("qwen3_moe")
    start = plan_of(teacher, dataclasses.replace(SMALL, population=0, iterations=0))
    frequency = MomentScore(mean=False, gate_power=0, norm_power=0)
    held = collect(teacher, list(blocks().batches(8)), frequency.requires)
    expected = make_plan(frequency, teacher.layers, held, Ratio(0.5), Uniform())
    assert start.layers == expected.layers
    fitness = plan_fitness(teacher, blocks(8), "kl", 8, list)
    found = plan_of(teacher, EEP(population=20, iterations=20, groups=2), fitness)
    assert fitness(found) >= fitness(start)
    search = found.lineage["search"]
    assert search["best"] == pytest.approx(fitness(found))
    assert search["first"] == pytest.approx(fitness(start))
    assert search["evaluations"] == 41
    plan, values = judged(SMALL)
    assert plan.lineage["search"]["best"] == max(values) > values[0]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_layers_of_a_group_share_their_set(groups: int) -> None:
    teacher = tiny("qwen3_moe", num_hidden_layers=4)
    plan = plan_of(
        teacher,
        EEP(population=6, iterations=6, groups=groups),
        fitness=lambda p: hash(p.fingerprint()) % 97,
    )
    sets = [part.kept for part in plan.layers]
    size = 4 // groups
    for g in range(groups):
        assert len({*sets[g * size : (g + 1) * size]}) == 1
    assert len(set(sets)) > 1 or groups == 1


def test_groups_that_do_not_divide_the_layers_are_refused() -> None:
    layers = tiny("qwen3_moe", num_hidden_layers=4).layers
    with pytest.raises(InputError, match=r"groups=3 does not divide 4 .* allowed: \[1, 2, 4\]"):
        EEP(groups=3).check(layers, Ratio(0.5), Uniform())
    EEP(groups=8).check(layers, Ratio(0.5), Uniform())
    mixed = [layers[0], dataclasses.replace(tiny("mixtral", num_local_experts=4).layers[1])]
    with pytest.raises(InputError, match="different numbers of experts together; allowed: 2"):
        EEP(groups=1).check(mixed, Ratio(0.5), Uniform())


@pytest.mark.parametrize("allocation", [GlobalScore(), PerLayer((4, 4)), Search()])
def test_other_allocations_are_refused(allocation: object) -> None:
    with pytest.raises(OutOfReach, match="allowed: allocation=uniform"):
        SMALL.check(tiny("qwen3_moe").layers, Ratio(0.5), allocation)


def test_a_search_without_text_is_refused() -> None:
    teacher = tiny("qwen3_moe")
    with pytest.raises(InputError, match="EEP judges students on text, and there is none"):
        make_plan(SMALL, teacher.layers, counted(teacher), Ratio(0.5), Uniform())
    for name in ("groups", "blocks"):
        with pytest.raises(InputError, match=f"{name}=0 must be at least 1"):
            EEP(**{name: 0})
    with pytest.raises(InputError, match="merging=-1 must be at least 0"):
        EEP(merging=-1)


def test_the_same_seed_gives_the_same_plan_and_another_one_judges_others() -> None:
    method = dataclasses.replace(SMALL, merging=5)
    (first, values), (again, same) = judged(method), judged(method)
    assert first == again
    assert values == same
    assert judged(dataclasses.replace(method, seed=1))[1] != values


def test_no_plan_is_judged_twice_in_a_phase() -> None:
    _, values = judged(dataclasses.replace(SMALL, population=10, iterations=30))
    assert len(set(values)) == len(values) == 41


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_one_hot_rows_are_the_slice_and_identity_is_the_model_to_the_bit(family: str) -> None:
    teacher = tiny(family)
    method, every = EEP(groups=1), tuple(range(8))
    sets = [(0, 2, 5, 7)]
    eye = torch.eye(8, dtype=torch.float64)
    picked = method.made_of(teacher.layers, sets, [eye[list(sets[0])]])
    assert picked == method.keeping(teacher.layers, sets)
    whole = method.made_of(teacher.layers, [every], [eye])
    assert torch.equal(hidden(apply_plan(teacher, whole)), hidden(teacher))


def test_merged_weights_are_linear_in_the_matrix() -> None:
    teacher = tiny("mixtral")
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(4, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    sets: Sequence[tuple[int, ...]] = [(0, 2, 5, 7)]

    def gate(matrix: torch.Tensor) -> torch.Tensor:
        plan = EEP(groups=1).made_of(teacher.layers, sets, [matrix])
        return apply_plan(teacher, plan).layers[0].stack().gate

    parts = [gate(matrix) for matrix in matrices]
    torch.testing.assert_close(gate(2 * matrices[0] - matrices[1]), 2 * parts[0] - parts[1])
    expected = torch.einsum("me,eih->mih", matrices[0].float(), teacher.layers[0].stack().gate)
    torch.testing.assert_close(parts[0], expected, atol=1e-6, rtol=1e-5)


def test_phase_two_starts_from_the_best_set_and_is_never_worse() -> None:
    teacher = tiny("qwen3_moe")
    fitness = plan_fitness(teacher, blocks(8), "kl", 8, list)
    first = plan_of(teacher, SMALL, fitness)
    both = plan_of(teacher, dataclasses.replace(SMALL, merging=60), fitness)
    assert [part.kept for part in both.layers] == [part.kept for part in first.layers]
    assert fitness(both) > fitness(first)
    merged = both.lineage["search"]["merged"]
    assert merged["first"] == pytest.approx(fitness(first))
    assert merged["best"] == pytest.approx(fitness(both))
    assert merged["evaluations"] == 61
    assert both.lineage["achieved"] == 0.5
    student = apply_plan(teacher, both)
    for part, old, new in zip(both.layers, teacher.layers, student.layers, strict=True):
        assert torch.equal(new.router_rows, old.router_rows[list(part.kept)])
