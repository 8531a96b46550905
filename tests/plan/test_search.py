"""Allocation by search: the total, the floors, what is judged, and whole methods under it."""

import random
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from families import tiny
from rerail import api
from rerail.compress.base import make_plan
from rerail.errors import InputError, OutOfReach
from rerail.evaluate.fitness import plan_fitness
from rerail.evaluate.perplexity import score_blocks
from rerail.language_model import LanguageModel
from rerail.methods.hc_smoe import HCSMoE
from rerail.methods.reap import MomentScore
from rerail.methods.svd import WhitenedSVD
from rerail.plan.allocation import GlobalScore, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.plan.search import Kept, Search, Searching, mutated
from rerail.statistics.collect import collect
from students import blocks

LAYERS = tiny("qwen3_moe", num_hidden_layers=4).layers
TEXT = blocks(12, 12)
SCORES = [torch.arange(8.0) ** (2 * i) for i in range(4)]  # ever fewer experts that matter


def found(search: Search, fitness: Any, removed: float = 0.5, least: int = 2) -> Searching:
    allocation = search.with_fitness(fitness)
    allocation.shares(LAYERS, removed, [least] * 4, SCORES)
    return allocation


def towards(best: Sequence[int], kept: Kept) -> float:
    """A fitness whose one maximum, among counts of the same total, is `best`."""
    return -float(sum((a - b) ** 2 for a, b in zip(kept, best, strict=True)))


def rough(kept: Kept) -> float:
    """A fitness without any order."""
    return random.Random(str(kept)).random()


@pytest.mark.parametrize("removed", [0.25, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("least", [1, 2, 3])
def test_every_candidate_has_the_uniform_total_and_all_floors(removed: float, least: int) -> None:
    allocation = found(Search(evaluations=25, floor=2), rough, removed, least)
    total = 4 * (8 - int(8 * removed + 1e-9))
    assert len(allocation.judged) == 25
    for kept in allocation.judged:
        assert sum(kept) == total
        assert max(2, least) <= min(kept) <= max(kept) <= 8


@pytest.mark.parametrize("best", [(7, 3, 2, 4), (2, 2, 6, 6), (4, 4, 4, 4), (2, 8, 4, 2)])
def test_the_best_counts_are_reached(best: Kept) -> None:
    allocation = found(Search(evaluations=150), partial(towards, best))
    assert allocation.ranked()[0] == best
    shares = allocation.shares(LAYERS, 0.5, [2] * 4, None)
    assert [8 - round(8 * share) for share in shares] == list(best)


def test_layers_that_are_alike_stay_even() -> None:
    """Where every layer gains less from each further expert, nothing beats even counts."""

    def concave(kept: Kept) -> float:
        return sum(n**0.5 for n in kept)

    assert found(Search(evaluations=80), concave).ranked()[0] == (4, 4, 4, 4)
    assert found(Search(evaluations=80), lambda kept: 1.0).ranked()[0] == (4, 4, 4, 4)


def test_the_same_seed_judges_the_same_and_another_one_others() -> None:
    first, again, other = (
        list(found(Search(evaluations=30, seed=seed), rough).judged) for seed in (3, 3, 4)
    )
    assert first == again
    assert first[:2] == other[:2]
    assert first != other


def test_even_counts_are_judged_first_then_those_of_the_scores_and_no_counts_twice() -> None:
    judged: list[Kept] = []

    def fitness(kept: Kept) -> float:
        judged.append(kept)
        return rough(kept)

    found(Search(evaluations=25), fitness)
    shares = GlobalScore().shares(LAYERS, 0.5, [2] * 4, SCORES)
    assert judged[0] == (4, 4, 4, 4)
    assert judged[1] == tuple(8 - round(8 * share) for share in shares) != judged[0]
    assert len(set(judged)) == len(judged) == 25


def test_more_evaluations_go_on_from_fewer_so_that_the_best_never_falls() -> None:
    runs = [found(Search(evaluations=n), rough) for n in (1, 5, 20, 60)]
    for short, long in pairwise(runs):
        assert list(long.judged)[: len(short.judged)] == list(short.judged)
    bests = [max(run.judged.values()) for run in runs]
    assert bests == sorted(bests)
    assert bests[-1] > bests[0]


def test_a_search_ends_where_all_counts_are_known() -> None:
    allocation = found(Search(evaluations=10**6), rough, removed=0.75, least=1)
    ways = [k for k in _counts(4, 8) if sum(k) == 8]
    assert set(allocation.judged) <= set(ways)
    assert len(allocation.judged) > 0.9 * len(ways)


def _counts(layers: int, most: int) -> list[Kept]:
    if layers == 0:
        return [()]
    return [(n, *rest) for n in range(1, most + 1) for rest in _counts(layers - 1, most)]


def test_where_nothing_can_move_nothing_does() -> None:
    kept = mutated((8, 8, 8), [2] * 3, [8] * 3, Search(), random.Random(0))
    assert kept == (8, 8, 8)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"evaluations": 0}, r"allocation\.evaluations=0 must be at least 1"),
        ({"blocks": 0}, r"allocation\.blocks=0 must be at least 1"),
        ({"measure": "nll"}, r"allocation\.measure='nll' is not one of esap, kl"),
    ],
)
def test_settings_that_mean_nothing_are_sentences(fields: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Search(**fields)


METHODS = {
    "slice": MomentScore(),
    "mask": MomentScore(router="mask"),
    "guarded": MomentScore(guard="outliers"),
    "hc_smoe": HCSMoE(),
}


@pytest.mark.parametrize("measure", ["esap", "kl"])
@pytest.mark.parametrize("name", METHODS)
def test_a_student_is_never_worse_than_by_uniform_or_global_counts(name: str, measure: Any) -> None:
    teacher, method = tiny("qwen3_moe", num_hidden_layers=3), METHODS[name]
    batches = list(TEXT.batches(4))
    statistics = collect(teacher, batches, method.requires)
    search = Search(evaluations=12, measure=measure)
    fitness = plan_fitness(teacher, TEXT, measure, 4, lambda b: b)
    decide = partial(make_plan, method, teacher.layers, statistics, Ratio(0.5))
    plan = decide(search, fitness=fitness)
    even, by_score = (decide(allocation) for allocation in (Uniform(), GlobalScore()))
    assert fitness(plan) >= max(fitness(even), fitness(by_score))
    assert plan.stored(teacher.layers) == even.stored(teacher.layers)
    assert sum(plan.lineage["counts"]) == 12
    assert plan.lineage["search"] == {
        "measure": measure,
        "evaluations": 12,
        "even": fitness(even),
        "best": fitness(plan),
    }
    student, states = apply_plan(teacher, plan), score_blocks(teacher, batches).hidden
    scores = score_blocks(student, batches, states)
    mean = float(getattr(scores, measure).sum() / scores.tokens.sum())
    assert fitness(plan) == pytest.approx(-mean if measure == "kl" else mean, rel=1e-6)


def test_what_cannot_search_says_so() -> None:
    layers = tiny("qwen3_moe").layers
    statistics: Any = None
    with pytest.raises(OutOfReach, match="counts experts, and WhitenedSVD keeps them all"):
        WhitenedSVD().check(layers, Ratio(0.5), Search())
    with pytest.raises(OutOfReach, match="plans many times, and MomentScore measures every scope"):
        MomentScore(sequential=True).check(layers, Ratio(0.5), Search())
    with pytest.raises(OutOfReach, match="cannot be left 4 router rows by Search"):
        MomentScore().check(tiny("deepseek_v3").layers, Ratio(0.5), Search())
    with pytest.raises(OutOfReach, match="cannot keep 4 experts with at least"):
        MomentScore().check(layers, Ratio(0.75), Search(floor=3))
    statistics = collect(tiny("qwen3_moe"), list(TEXT.batches(4)), MomentScore().requires)
    with pytest.raises(InputError, match="judges students on text, and there is none"):
        make_plan(MomentScore(), layers, statistics, Ratio(0.5), Search())


class Known(api.Recorder):
    """Knows of every plan that was judged before."""

    def __init__(self) -> None:
        self.values: dict[Any, float] = {}
        self.made = 0

    def fitness(self, teacher: Any, text: Any, what: Any, make: Any) -> float:
        key = (text.fingerprint, tuple(what))
        if key not in self.values:
            self.values[key] = make()
            self.made += 1
        return self.values[key]


def test_a_search_through_the_api_goes_on_from_what_is_known() -> None:
    teacher = LanguageModel(tiny("qwen3_moe", num_hidden_layers=3), None, api.ModelSource("tiny"))
    recorder = Known()

    def plan(search: Search, **options: Any) -> Plan:
        return api.plan(teacher, MomentScore(), 0.5, TEXT, allocation=search, **options)

    first = plan(Search(evaluations=6, blocks=8), recorder=recorder)
    assert recorder.made == 6
    assert plan(Search(evaluations=6, blocks=8), recorder=recorder).layers == first.layers
    assert recorder.made == 6
    plan(Search(evaluations=8, blocks=8), recorder=recorder)
    assert recorder.made == 8
    assert first.to_json() == plan(Search(evaluations=6, blocks=8)).to_json()
    statistics = api.collect(teacher, TEXT, MomentScore())
    with pytest.raises(InputError, match="judges students on calibration text and there is none"):
        api.plan(teacher, MomentScore(), 0.5, statistics=statistics, allocation=Search())
    assert api.plan(teacher, MomentScore(), 0.0, TEXT, allocation=Search()).layers == ()
