import dataclasses
import functools
import itertools

import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import extended, make_plan
from rerail.compress.solvers import bases, whitening
from rerail.compress.solvers.bases import by_use, group_ranks, group_scores
from rerail.compress.solvers.blending import used
from rerail.errors import InputError, OutOfReach
from rerail.experts.base import BankSpec, build_bank
from rerail.experts.grouped_basis import bucket_of, from_buckets, in_buckets
from rerail.methods.mobe import MoBE
from rerail.methods.rfid_moe import RFIDMoE
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio, dense_numbers, numbers_kept
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect
from rerail.statistics.routed import Count
from rerail.statistics.statistic import LayerStatistics, StatisticSet

COUNT = Count()
QUICK = RFIDMoE(steps=10)
COUNTS = torch.tensor([3, 9, 0, 7, 9, 1, 40, 2])


def view(counts: torch.Tensor = COUNTS) -> LayerStatistics:
    return LayerStatistics({"count": counts}, (COUNT,))


@functools.cache
def measured(family: str = "qwen3_moe") -> tuple[MoEModel, StatisticSet]:
    model, ids = tiny(family), tokens(20, 24)
    return model, collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], [COUNT])


def planned(method: RFIDMoE, family: str = "qwen3_moe", removed: float = 0.4) -> Plan:
    model, held = measured(family)
    return make_plan(method, model.layers, held, Ratio(removed), Uniform())


def test_groups_are_runs_of_falling_use_and_ties_keep_their_order() -> None:
    assert by_use(COUNTS, 4).tolist() == [1, 0, 1, 0, 0, 1, 0, 1]
    assert by_use(torch.zeros(6), 4).tolist() == [0, 0, 0, 0, 1, 1]  # the last one is smaller
    for size in (1, 3, 8, 99):
        groups = by_use(COUNTS, size)
        assert torch.bincount(groups).tolist()[:-1] == [size] * (int(groups.max()))
        use = [COUNTS[groups == g] for g in range(int(groups.max()) + 1)]
        assert all(a.min() >= b.max() for a, b in itertools.pairwise(use))


def test_scores_mix_effective_ranks_and_use() -> None:
    stack = torch.randn(8, 6, 10, generator=torch.Generator().manual_seed(0))
    stack[6] = torch.outer(torch.ones(6), torch.ones(10))  # the most used expert has rank one
    groups, share = by_use(COUNTS, 2), used(COUNTS)
    by_rank = group_scores(stack, groups, share, 1.0)
    by_count = group_scores(stack, groups, share, 0.0)
    assert torch.equal(by_rank, group_scores(stack, groups, used(COUNTS.flip(0)), 1.0))
    assert torch.equal(by_count, group_scores(stack.flip(1) * 7, groups, share, 0.0))
    expected = torch.tensor([49.0, 16, 5, 1]).double() / 71
    torch.testing.assert_close(by_count, expected)
    whole = torch.cat([stack[1], stack[6]]).double()
    energy = torch.linalg.svdvals(whole).square()
    effective = torch.special.entr(energy / energy.sum()).sum().exp()
    plain = whitening.Moments(None, share, 10)
    ranks = [whitening.effective_ranks(stack[groups == g].flatten(0, 1)[None], plain) for g in range(4)]  # fmt: skip # noqa: E501
    torch.testing.assert_close(ranks[0][0], effective)
    torch.testing.assert_close(by_rank, torch.cat(ranks) / torch.cat(ranks).sum())
    assert by_rank.argmin() == 0
    mixed = group_scores(stack, groups, share, 0.8)
    torch.testing.assert_close(mixed, 0.8 * by_rank + 0.2 * by_count)


def test_a_group_that_is_never_used_keeps_a_rank_and_equal_groups_get_equal_ones() -> None:
    layer = tiny("qwen3_moe").layers[0]
    budget = numbers_kept(dense_numbers(layer), 0.4)
    counts = torch.tensor([900, 800, 700, 600, 0, 0, 0, 0])
    lopsided = dataclasses.replace(QUICK, xi=0.0)
    ranks = lopsided.sizes(layer, budget, view(counts))["gate"]
    assert ranks[1] == 1 < ranks[0]
    same = tiny("qwen3_moe").layers[0]
    for parameter in expert_parameters(same.experts).values():
        parameter.data[:] = parameter.data[:1].clone()
    found = QUICK.sizes(same, budget, view(torch.full((8,), 5)))
    assert max(found["gate"]) - min(found["gate"]) <= 1


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("removed", [0.25, 0.5])
@pytest.mark.parametrize("method", [QUICK, dataclasses.replace(QUICK, bases=2, residual="none")])
def test_numbers_are_the_budget_to_within_a_rank(method, family: str, removed: float) -> None:
    model, plan = measured(family)[0], planned(method, family, removed)
    layer = model.layers[0]
    n, p, d, _ = layer.dims
    sizes, allowed = plan.layers[0].bank.integers, numbers_kept(dense_numbers(layer), removed)
    m, s = method.bases, int(0.03 * p * d) if method.residual == "hashed" else 0
    assert sizes["buckets"] == s
    numbers = sum(k * (4 * p + m * d) for name in ("gate", "up") for k in sizes[name])
    numbers += 2 * n * s + (2 * n * m if m > 1 else 0) + dense_numbers(layer) - 2 * n * p * d
    bank = apply_plan(model, plan).layers[0].experts
    assert sum(bank.stored().values()) == numbers
    assert allowed - (4 * p + m * d) < numbers <= allowed


def test_buckets_are_even_and_their_columns_orthonormal() -> None:
    for entries, buckets in ((40, 7), (40, 40), (12, 1), (128, 3)):
        at = bucket_of(entries, buckets, 5)
        counts = torch.bincount(at, minlength=buckets)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1
        eye = torch.eye(buckets, dtype=torch.float64)
        columns = torch.stack([from_buckets(row, entries, 5) for row in eye], dim=1)
        torch.testing.assert_close(columns.T @ columns, eye)
        assert ((columns != 0).sum(dim=1) == 1).all()


def test_buckets_come_from_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = bucket_of(1000, 10, 0).clone()
    bucket_of.cache_clear()
    torch.manual_seed(1)
    assert torch.equal(bucket_of(1000, 10, 0), first)
    assert not torch.equal(bucket_of(1000, 10, 1), first)
    # a checkpoint holds the seed alone, so these numbers may never change
    assert first[:12].tolist() == [4, 7, 5, 5, 7, 9, 9, 0, 1, 4, 1, 5]


def test_a_residual_lowers_the_squared_error_by_its_own_square() -> None:
    residual = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0)).double()
    for buckets in (1, 7, 40):
        eta = in_buckets(residual, buckets, 2)
        made = torch.stack([from_buckets(row, 40, 2) for row in eta]).view_as(residual)
        left = (residual - made).square().sum(dim=(1, 2))
        whole = residual.square().sum(dim=(1, 2))
        torch.testing.assert_close(whole - left, eta.square().sum(dim=1))
        if buckets == 40:  # a bucket an entry is the entry
            assert left.max() < 1e-20


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_residual_is_that_of_the_fit(family: str) -> None:
    layer = tiny(family).layers[0]
    plain = dataclasses.replace(QUICK, residual="none")
    sizes = {"groups": (0,) * 4 + (1,) * 4, "gate": (3, 5), "up": (4, 4), "bases": 1, "seed": 0}
    banks = []
    for method, buckets in ((QUICK, 12), (plain, 0)):
        integers = {**sizes, "buckets": buckets}
        spec = method.spec(layer, integers)
        tensors = method.factor(layer, view(), integers)
        banks.append(build_bank(spec, range(8), 0, {0: layer.stock()}, tensors))
    for name, old in zip(("gate", "up"), layer.stack()[:2], strict=True):
        for e in range(8):
            with_it, without = (
                float((getattr(bank.materialise(e), name) - old[e]).square().sum())
                for bank in banks
            )
            square = float(banks[0].solved(f"{name}.eta")[e].square().sum())
            assert without - with_it == pytest.approx(square, rel=1e-3)
            assert square > 0


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_one_group_without_a_residual_is_mobe(num: int, family: str) -> None:
    layer = tiny(family).layers[0]
    mobe = MoBE(matrices="gate+up", bases=num, steps=20)
    rfid = RFIDMoE(group_size=8, bases=num, residual="none", steps=20)
    integers = {"groups": (0,) * 8, "gate": (4,), "up": (4,), "bases": num}
    integers |= {"buckets": 0, "seed": 0}
    pairs = [(mobe, {"bases": num, "rank": 4}), (rfid, integers)]
    first, second = (
        build_bank(
            m.spec(layer, sizes), range(8), 0, {0: layer.stock()}, m.factor(layer, view(), sizes)
        )
        for m, sizes in pairs
    )
    for a, b in zip(first.stack(), second.stack(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert rfid.sizes(layer, 900 + layer.stack().down.numel(), view())["groups"] == (0,) * 8


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_full_rank_without_activation_is_exact_and_down_is_the_teachers(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the fit starts at another scale; its start itself is exact
    monkeypatch.setattr(
        bases,
        "fit_many",
        lambda stacks, m, ranks, _: [
            bases.start(s, m, r) for s, r in zip(stacks, ranks, strict=True)
        ],
    )
    model, held = measured(family)
    method = RFIDMoE(activation="identity", residual="none")
    views = [held.of(layer, method.requires) for layer in model.layers]
    decisions = method.decide(model.layers, views, [10**9] * 2)
    student = apply_plan(model, extended(Plan(), decisions))
    with torch.no_grad():
        gap = (student.hidden(tokens()) - model.hidden(tokens())).abs().max()
    assert gap < 1e-4
    for old, new in zip(model.layers, student.layers, strict=True):
        own = expert_parameters(old.experts)
        kept = dict(new.experts.shell.named_parameters())
        assert kept["down_proj"] is own["down_proj"]
        assert set(kept) == set(own) - {"gate_up_proj"}


def test_permuted_experts_permute_the_student() -> None:
    model, other, turn = tiny("qwen3_moe"), tiny("qwen3_moe"), [3, 1, 0, 2, 7, 6, 5, 4]
    counts = torch.tensor([5, 9, 1, 7, 8, 2, 40, 3])
    for layer in other.layers:
        for parameter in expert_parameters(layer.experts).values():
            parameter.data = parameter.data[turn].clone()
    banks = []
    for m, c in ((model, counts), (other, counts[turn])):
        held = StatisticSet({0: {"count": c}, 1: {"count": c}})
        plan = make_plan(dataclasses.replace(QUICK, steps=0), m.layers, held, Ratio(0.4), Uniform())
        banks.append(plan.layers[0].bank.integers)
    assert [banks[0]["groups"][t] for t in turn] == list(banks[1]["groups"])
    assert banks[0]["gate"] == banks[1]["gate"]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_reach_that_is_named_is_the_reach(family: str) -> None:
    layer = tiny(family).layers[0]
    with pytest.raises(OutOfReach, match="ratios from 0 to") as refused:
        QUICK.sizes(layer, numbers_kept(dense_numbers(layer), 0.95))
    reach = float(str(refused.value).split("ratios from 0 to ")[1].split()[0])
    assert 0.4 < reach < 2 / 3
    assert QUICK.sizes(layer, numbers_kept(dense_numbers(layer), reach - 1e-3))["up"] == (1, 1)
    with pytest.raises(OutOfReach):
        QUICK.sizes(layer, numbers_kept(dense_numbers(layer), reach + 1e-3))


def test_settings_that_fit_no_group_are_refused() -> None:
    layer = tiny("qwen3_moe", num_experts=6).layers[0]
    with pytest.raises(InputError, match=r"bases=4 must divide .* they are \[4, 2\] in layer 0"):
        RFIDMoE(bases=4).check([layer], Ratio(0.4), Uniform())
    with pytest.raises(InputError, match="group_size=0; allowed: 1 or more"):
        RFIDMoE(group_size=0).check([layer], Ratio(0.4), Uniform())
    with pytest.raises(InputError, match=r"share=1.5 is outside \[0, 1\]"):
        RFIDMoE(share=1.5).check([layer], Ratio(0.4), Uniform())
    RFIDMoE(bases=2).check([layer], Ratio(0.4), Uniform())
    assert group_ranks(layer, 10**9, 0, by_use(torch.ones(6), 4), 2, None)["gate"] == (16, 8)


def test_a_last_group_that_is_smaller_is_stored_and_read() -> None:
    model = tiny("qwen3_moe", num_experts=6)
    held = StatisticSet({i: {"count": torch.arange(6)} for i in range(2)})
    plan = make_plan(QUICK, model.layers, held, Ratio(0.4), Uniform())
    assert plan.layers[0].bank.integers["groups"] == (1, 1, 0, 0, 0, 0)
    student = apply_plan(model, plan)
    with torch.no_grad():
        assert torch.isfinite(student.hidden(tokens())).all()
    assert isinstance(student.layers[0].experts.spec, BankSpec)


def test_more_numbers_are_closer() -> None:
    model, gaps = measured()[0], []
    for removed in (0.2, 0.55):
        student = apply_plan(model, planned(RFIDMoE(steps=60), removed=removed))
        with torch.no_grad():
            gaps.append(float((student.hidden(tokens()) - model.hidden(tokens())).norm()))
    assert gaps == sorted(gaps)


@pytest.mark.parametrize("activation", ["silu", "tanh", "identity"])
def test_stacks_fitted_side_by_side_are_fitted_as_each_alone(activation: str) -> None:
    stacks = torch.randn(3, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    fit = bases.Fit(activation, 30, 0.05, 99)
    together = bases.fit_many(stacks, 2, [2, 5, 3], fit)
    for found, stack, rank in zip(together, stacks, (2, 5, 3), strict=True):
        for a, b in zip(found, bases.fit_bases(stack, 2, rank, fit), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
