"""Sub-MoE: kernel k-means, windows of layers, averages seen in a joint subspace."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.solvers.grouping import merged_experts, shares_in_group
from rerail.compress.solvers.kernel_kmeans import clustered, lloyd, output_gram, seed_orders
from rerail.compress.solvers.whitening import layer_moments
from rerail.compress.solvers.windows import dealt, windows_of
from rerail.errors import InputError, OutOfReach
from rerail.methods.hc_smoe import HCSMoE
from rerail.methods.sub_moe import SubMoE
from rerail.methods.sub_moe_low_rank import SubMoELowRank
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoEModel
from rerail.plan.allocation import GlobalScore, PerLayer, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio, dense_numbers, numbers_kept
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect
from rerail.statistics.routed import Count
from rerail.statistics.statistic import StatisticSet

PLAIN = SubMoE(rows=64)
COUNTS = 3 * torch.tensor([9, 4, 0, 3, 2, 7, 0, 1])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(seed: int, count: int = 12) -> torch.Tensor:
    return torch.randn(count, 5, generator=generator(seed), dtype=torch.float64)


def inputs(count: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 16, generator=generator(seed))


def double(family: str = "qwen3_moe") -> MoEModel:
    teacher = tiny(family)
    teacher.model.to(torch.float64)
    teacher.model.set_experts_implementation("eager")
    return teacher


def filled(teacher: MoEModel, *methods: object) -> StatisticSet:
    wanted = [s for method in methods for s in method.requires]
    return collect(teacher, [(tokens(8, 12), torch.ones(8, 12).bool())], wanted)


def plan_of(teacher: MoEModel, method: object, removed: float = 0.5, **how: object) -> Plan:
    allocation = how.pop("allocation", Uniform())
    statistics = how.pop("statistics", None) or filled(teacher, method)
    return make_plan(method, teacher.layers, statistics, Ratio(removed), allocation)


def hidden(model: MoEModel) -> torch.Tensor:
    with torch.no_grad():
        return model.hidden(tokens(2, 12, seed=5))


def twins(layer, copies: list[int]) -> None:
    """Make expert i a copy of expert copies[i]."""
    for parameter in expert_parameters(layer.experts).values():
        parameter.data = parameter.data[copies].clone()


def partition(labels: list[int]) -> set[frozenset[int]]:
    return {frozenset(i for i, x in enumerate(labels) if x == label) for label in labels}


# ---- k-means


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [2, 3, 5])
def test_kernel_k_means_is_lloyd_on_the_vectors_with_equal_seeds(seed: int, count: int) -> None:
    x = points(seed)
    seeds = seed_orders(x @ x.mT, 3, generator(seed))[:, :count]
    labels, loss = lloyd(x @ x.mT, seeds)
    for own, start, j in zip(labels, seeds, loss, strict=True):
        means, found = kmeans2(x.numpy(), x[start].numpy(), iter=50, minit="matrix")
        assert own.tolist() == found.tolist()
        assert float(j) == pytest.approx(np.square(x.numpy() - means[found]).sum(), rel=1e-9)


def test_seeds_are_all_points_once_and_twins_come_last() -> None:
    x = points(0, 6)[[0, 1, 2, 3, 0, 1]]
    orders = seed_orders(x @ x.mT, 20, generator())
    for order in orders.tolist():
        assert sorted(order) == list(range(6))
        assert len({i % 4 for i in order[:4]}) == 4
    assert len({tuple(order) for order in orders.tolist()}) > 5


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_equal_vectors_share_a_cluster_and_lose_nothing_once_there_are_enough(count: int) -> None:
    x = points(3, 4)[[0, 1, 2, 3, 3, 1, 0, 2]]
    labels, loss = clustered(x @ x.mT, seed_orders(x @ x.mT, 5, generator()), count)
    assert all(labels[a] == labels[b] for a, b in [(0, 6), (1, 5), (2, 7), (3, 4)])
    assert (loss == 0) == (count == 4)


def test_every_label_is_used_and_numbered_by_its_lowest_member_also_among_twins() -> None:
    x = points(3, 2)[[0, 1, 0, 0, 1, 1]]
    for count in range(1, 7):
        labels, _ = clustered(x @ x.mT, seed_orders(x @ x.mT, 4, generator()), count)
        assert list(dict.fromkeys(labels.tolist())) == list(range(count))


def test_the_best_restart_is_taken() -> None:
    x = points(4, 16)
    gram = x @ x.mT
    orders = seed_orders(gram, 12, generator())
    losses = lloyd(gram, orders[:, :4])[1]
    assert float(losses.max()) > float(losses.min()) * 1.01
    assert clustered(gram, orders, 4)[1] == pytest.approx(float(losses.min() / gram.trace()))


def test_similarity_is_the_mean_cosine_of_outputs_token_by_token() -> None:
    layer = double().layers[0]
    x = inputs().double()
    out = [layer.run(x, torch.full((40, 1), e), torch.ones(40, 1, dtype=x.dtype)) for e in range(8)]
    found = output_gram(layer, x, unit=True)
    for i, j in itertools.product(range(8), repeat=2):
        expected = torch.cosine_similarity(out[i], out[j], dim=1).mean()
        torch.testing.assert_close(found[i, j], expected, atol=1e-12, rtol=0)
    assert torch.equal(found, found.mT) or (found - found.mT).abs().max() < 1e-15
    assert found.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(found.diagonal(), torch.ones(8, dtype=x.dtype))
    inner = torch.stack([torch.stack([(a * b).sum(1).mean() for a in out]) for b in out])
    torch.testing.assert_close(output_gram(layer, x, unit=False), inner)


def test_an_expert_that_answers_nothing_is_like_no_other() -> None:
    layer = double().layers[0]
    expert_parameters(layer.experts)["down_proj"].data[3] = 0
    found = output_gram(layer, inputs().double(), unit=True)
    assert not found[3].any()
    assert torch.isfinite(found).all()


def test_the_scale_of_an_expert_matters_to_the_output_kernel_only() -> None:
    teacher = tiny("qwen3_moe")
    held = filled(teacher, PLAIN)
    views = [held.of(layer, PLAIN.requires) for layer in teacher.layers]
    changed = {}
    for kernel in ("cosine", "output"):
        method = dataclasses.replace(PLAIN, kernel=kernel)
        pair = list(zip(teacher.layers, views, strict=True))
        before = [method.group(layer, view, 4).tolist() for layer, view in pair]
        for layer in teacher.layers:
            expert_parameters(layer.experts)["down_proj"].data[:3] *= 20
        after = [method.group(layer, view, 4).tolist() for layer, view in pair]
        for layer in teacher.layers:
            expert_parameters(layer.experts)["down_proj"].data[:3] /= 20
        changed[kernel] = before != after
    assert changed == {"cosine": False, "output": True}


# ---- windows


def test_the_counts_of_a_window_are_the_best_of_all_that_sum_to_its_total() -> None:
    losses = [torch.rand(9, generator=generator(i)).sort(descending=True).values for i in range(3)]
    found = dealt([[0, 1, 2]], [4, 4, 4], [1, 2, 1], [8, 8, 5], lambda i, ks: losses[i][ks])
    every = itertools.product(range(1, 9), range(2, 9), range(1, 6))
    best = min(
        (k for k in every if sum(k) == 12), key=lambda k: sum(losses[i][n] for i, n in enumerate(k))
    )
    assert tuple(found) == best


def test_ties_stay_even_and_then_favour_earlier_layers() -> None:
    assert dealt([[0, 1]], [4, 4], [1, 1], [8, 8], lambda _, ks: [0.0] * len(ks)) == [4, 4]
    assert dealt([[0, 1]], [4, 3], [1, 1], [8, 8], lambda _, ks: [0.0] * len(ks)) == [4, 3]


def test_a_layer_of_equal_experts_leaves_its_share_to_the_other_one() -> None:
    teacher = tiny("qwen3_moe")
    twins(teacher.layers[0], [0] * 8)
    plan = plan_of(teacher, PLAIN)
    assert [part.bank.stored for part in plan.layers] == [1, 7]
    assert plan.lineage["achieved"] == 0.5
    alone = plan_of(teacher, dataclasses.replace(PLAIN, window=1))
    assert [part.bank.stored for part in alone.layers] == [4, 4]


def test_rows_of_a_router_stay_enough_for_top_k_in_every_layer_of_a_window() -> None:
    teacher = tiny("qwen3_moe")
    twins(teacher.layers[0], [0] * 8)
    plan = plan_of(teacher, dataclasses.replace(PLAIN, router="pooled"))
    assert [part.bank.stored for part in plan.layers] == [2, 6]


def test_another_allocation_decides_in_place_of_windows() -> None:
    teacher = tiny("qwen3_moe")
    plan = plan_of(teacher, PLAIN, allocation=PerLayer((3, 6)))
    assert [part.bank.stored for part in plan.layers] == [3, 6]
    assert sum(plan_of(teacher, PLAIN, allocation=GlobalScore()).lineage["counts"]) == 8


def test_windows_are_consecutive_and_the_last_may_be_narrower() -> None:
    layer = tiny("qwen3_moe").layers[0]
    some = [dataclasses.replace(layer, index=i) for i in (1, 2, 3, 4, 5)]
    assert windows_of(some, 2) == [[0, 1], [2, 3], [4]]
    assert windows_of(some, 1) == [[0], [1], [2], [3], [4]]
    with pytest.raises(InputError, match="window=0 must be at least 1"):
        windows_of(some, 0)


def test_a_window_across_a_dense_layer_is_refused_before_planning() -> None:
    layers = tiny("qwen3_moe").layers
    apart = [layers[0], dataclasses.replace(layers[1], index=3)]
    with pytest.raises(OutOfReach, match=r"layers \[0, 3\] .* \[1, 2\] .* dense; .*window=1"):
        PLAIN.check(apart, Ratio(0.5), Uniform())
    dataclasses.replace(PLAIN, window=1).check(apart, Ratio(0.5), Uniform())
    mixed = [layers[0], dataclasses.replace(tiny("mixtral").layers[1], index=1)]
    with pytest.raises(OutOfReach, match="differ in size"):
        PLAIN.check(mixed, Ratio(0.5), Uniform())


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"rows": 0}, {"restarts": 0}, {"energy": 0.0}, {"energy": 1.5}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        SubMoE(**wrong)


# ---- the merged experts


class Labelled(HCSMoE):
    """HC-SMoE with labels that are handed to it."""

    labels = (0, 1, 0, 2, 1, 2, 3, 0)

    def group(self, layer, statistics, num_stored):
        return torch.tensor(self.labels)


class SubLabelled(SubMoE):
    """Sub-MoE with the same labels."""

    labels = Labelled.labels

    def group(self, layer, statistics, num_stored):
        return torch.tensor(self.labels)


def labelled(teacher: MoEModel) -> StatisticSet:
    """Return all statistics with counts that are far apart."""
    methods = (Labelled(), PLAIN, SubMoELowRank(merger=PLAIN))
    held = filled(teacher, *methods)
    tensors = {i: {**named, Count().name: COUNTS} for i, named in held.tensors.items()}
    return StatisticSet(tensors)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_full_rank_is_the_frequency_weighted_merge_of_the_same_labels_to_the_bit(
    family: str,
) -> None:
    teacher = tiny(family)
    held = labelled(teacher)
    found = plan_of(teacher, SubLabelled(rows=64, window=1), statistics=held)
    expected = plan_of(teacher, Labelled(), statistics=held)
    assert found.layers == expected.layers
    assert torch.equal(hidden(apply_plan(teacher, found)), hidden(apply_plan(teacher, expected)))


def test_all_groups_of_one_are_the_model_to_the_bit() -> None:
    teacher = tiny("qwen3_moe")
    view = filled(teacher, PLAIN).of(teacher.layers[0], PLAIN.requires)
    assert PLAIN.group(teacher.layers[0], view, 8).tolist() == list(range(8))
    plan = plan_of(teacher, dataclasses.replace(PLAIN, rank=1), allocation=PerLayer((8, 7)))
    student = apply_plan(teacher, plan)
    for before, after in zip(teacher.layers[0].stack(), student.layers[0].stack(), strict=True):
        assert torch.equal(before, after)


def by_joint_svd(
    teacher: MoEModel, layer: int, name: str, rank: int, whiten: bool = False
) -> list[torch.Tensor]:
    """Return U_r Sigma_r V_r^T of the groups of `Labelled.labels`, by the joint SVD itself."""
    stack = getattr(teacher.layers[layer].stack(), name)
    labels, share = (
        torch.tensor(Labelled.labels),
        shares_in_group(torch.tensor(Labelled.labels), COUNTS),
    )
    moments = SubMoELowRank(merger=PLAIN)
    view = labelled(teacher).of(teacher.layers[layer], moments.requires)
    seen = layer_moments(teacher.layers[layer], view, True, 0.25, 1e-6)[name]
    out = []
    for c in range(4):
        members = torch.nonzero(labels == c).flatten().tolist()
        roots = [
            torch.linalg.cholesky(seen.of(e, stack.device))
            if whiten
            else torch.eye(stack.shape[2], dtype=stack.dtype)
            for e in members
        ]
        wide = torch.cat([stack[e] @ s for e, s in zip(members, roots, strict=True)], dim=1)
        u, sigma, v = torch.linalg.svd(wide, full_matrices=False)
        blocks = v[:rank].split(stack.shape[2], dim=1)
        mean = sum(
            share[e] * block @ torch.linalg.inv(s)
            for e, s, block in zip(members, roots, blocks, strict=True)
        )
        out.append(u[:, :rank] * sigma[:rank] @ mean)
    return out


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_projected_average_is_what_the_joint_svd_gives(rank: int) -> None:
    teacher = double()
    held = labelled(teacher)
    method = SubLabelled(rows=64, window=1, rank=rank)
    student = apply_plan(teacher, plan_of(teacher, method, statistics=held))
    for layer, after in zip(teacher.layers, student.layers, strict=True):
        for name, stack in after.stack()._asdict().items():
            expected = by_joint_svd(teacher, layer.index, name, rank)
            for slot, label in enumerate(Labelled.labels):
                torch.testing.assert_close(stack[slot], expected[label], atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_the_distance_to_the_average_falls_with_the_rank_down_to_nothing(family: str) -> None:
    teacher = double(family)
    held, full = labelled(teacher), {}
    layer = teacher.layers[0]
    mean = merged_experts(layer, torch.tensor(Labelled.labels), COUNTS)
    for rank in (1, 2, 4, 8, 16, 24):
        method = SubLabelled(rows=64, window=1, rank=rank)
        plan = plan_of(teacher, method, statistics=held)
        full[rank] = sum(
            float((plan.tensors[f"layers.0.{name}"] - mean[name]).norm()) for name in mean
        )
    assert list(full.values()) == sorted(full.values(), reverse=True)
    assert full[1] > 0.1
    assert full[24] < 1e-10


def test_a_single_member_of_rank_r_is_its_truncated_svd() -> None:
    teacher = double()
    held = labelled(teacher)
    plan = plan_of(teacher, SubLabelled(rows=64, window=1, rank=2), statistics=held)
    gate = teacher.layers[0].stack().gate[6]
    lost = gate - apply_plan(teacher, plan).layers[0].stack().gate[6]
    tail = torch.linalg.svdvals(gate)[2:].square().sum()
    torch.testing.assert_close(lost.square().sum(), tail)


def test_energy_chooses_the_least_rank_that_keeps_it() -> None:
    teacher = double()
    held = labelled(teacher)
    plan = plan_of(teacher, SubLabelled(rows=64, window=1, energy=0.8), statistics=held)
    stack = teacher.layers[0].stack().gate
    members = [e for e, c in enumerate(Labelled.labels) if c == 1]
    squares = torch.linalg.svdvals(torch.cat([stack[e] for e in members], dim=1)).square()
    rank = int((squares.cumsum(0) / squares.sum() < 0.8).sum()) + 1
    found = apply_plan(teacher, plan).layers[0].stack().gate[members[0]]
    assert 1 < rank < 8
    assert int(torch.linalg.matrix_rank(found)) == rank


def test_members_may_count_equally_or_only_the_most_used_one() -> None:
    teacher = tiny("qwen3_moe")
    held = labelled(teacher)
    groups = {}
    for members in ("frequency", "average", "drop"):
        method = SubLabelled(rows=64, window=1, members=members)
        bank = plan_of(teacher, method, statistics=held).layers[0].bank
        groups[members] = [[w for _, _, w in group] for group in bank.members]
    assert groups["frequency"][:2] == [[0.9, 0.0, 0.1], [4 / 6, 2 / 6]]
    assert groups["average"][:2] == [[1 / 3] * 3, [1 / 2] * 2]
    assert groups["drop"] == [[1.0, 0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0]]


def test_clusters_that_were_never_used_are_averaged() -> None:
    teacher = tiny("qwen3_moe")
    held = labelled(teacher)
    tensors = {i: {**t, Count().name: torch.zeros(8).long()} for i, t in held.tensors.items()}
    plan = plan_of(teacher, PLAIN, statistics=StatisticSet(tensors))
    assert torch.isfinite(hidden(apply_plan(teacher, plan))).all()
    for part in plan.layers:
        assert all(w == 1 / len(group) for group in part.bank.members for _, _, w in group)


def test_statistics_of_two_halves_of_the_text_give_the_plan_of_the_whole() -> None:
    teacher = tiny("qwen3_moe")
    ids = tokens(8, 12)
    halves = [(part, torch.ones_like(part).bool()) for part in ids.split(4)]
    whole = collect(teacher, halves, PLAIN.requires)
    assert plan_of(teacher, PLAIN, statistics=whole) == plan_of(teacher, PLAIN)


# ---- the low-rank variant


def low_rank(**changed: object) -> SubMoELowRank:
    merger = SubLabelled(rows=64, window=1)
    return SubMoELowRank(merger=merger, **changed)


@pytest.mark.parametrize("whiten", [True, False])
def test_low_rank_is_the_whitened_joint_svd_and_without_moments_the_plain_one(
    whiten: bool,
) -> None:
    teacher = double()
    held = labelled(teacher)
    student = apply_plan(
        teacher, plan_of(teacher, low_rank(inner=0.3, whiten=whiten), 0.65, statistics=held)
    )
    bank = student.layers[0].bank
    assert bank.spec.kind == "low_rank"
    for name, stack in student.layers[0].stack()._asdict().items():
        for slot, label in enumerate(Labelled.labels):
            rank = bank.spec.integers[name][label]
            assert rank < 8
            expected = by_joint_svd(teacher, 0, name, rank, whiten)[label]
            torch.testing.assert_close(stack[slot], expected, atol=1e-7, rtol=1e-7)


def test_low_rank_at_full_rank_is_the_average() -> None:
    teacher = double()
    held = labelled(teacher)
    view = held.of(teacher.layers[0], low_rank().requires)
    decision = low_rank(each=1e9).decide_layer(teacher.layers[0], view, 4)
    student = apply_plan(
        teacher,
        Plan(
            (decision.plan,),
            {},
            {f"layers.0.{name}": tensor for name, tensor in decision.tensors.items()},
        ),
    )
    mean = merged_experts(teacher.layers[0], torch.tensor(Labelled.labels), COUNTS)
    for name, tensor in student.layers[0].bank.dense().items():
        torch.testing.assert_close(tensor, mean[name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("removed", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("inner", [0.0, 0.2, 0.5])
def test_ranks_use_the_budget_up_whatever_windows_deal(removed: float, inner: float) -> None:
    teacher = tiny("mixtral")
    method = SubMoELowRank(merger=PLAIN, inner=inner)
    if removed == 0.25 and inner == 0.0:
        return
    plan = plan_of(teacher, method, removed)
    allowed = sum(numbers_kept(dense_numbers(layer), removed) for layer in teacher.layers)
    stored = plan.stored(teacher.layers)
    assert allowed - 2 * (16 + 24) < stored <= allowed


def test_fewer_experts_are_merged_the_more_each_of_them_loses() -> None:
    teacher = tiny("mixtral")
    counts = [
        sum(plan_of(teacher, SubMoELowRank(merger=PLAIN, inner=inner)).lineage["counts"])
        for inner in (0.0, 0.2, 0.4)
    ]
    assert counts == [8, 10, 14]


def test_low_rank_refuses_biases_and_what_no_rank_can_reach() -> None:
    method = SubMoELowRank(merger=PLAIN)
    with pytest.raises(OutOfReach, match="biases"):
        method.check(tiny("gpt_oss").layers, Ratio(0.5), Uniform())
    with pytest.raises(OutOfReach, match="rank 1 takes"):
        SubMoELowRank(merger=PLAIN, inner=0.95).check(
            tiny("qwen3_moe").layers, Ratio(0.95), Uniform()
        )
    with pytest.raises(InputError, match=r"inner=1 is outside \[0, 1\)"):
        SubMoELowRank(merger=PLAIN, inner=1)
