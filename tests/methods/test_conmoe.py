import pytest
import torch

from families import CONFIGS, tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.solvers.distances import between_rows, between_weights
from rerail.errors import InputError, OutOfReach
from rerail.methods.conmoe import ConMoE, minmax
from rerail.moe.fused_experts import ExpertWeights
from rerail.moe.model import MoEModel
from rerail.plan.allocation import GlobalScore, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.plan.sizes import Sizes
from rerail.statistics.collect import collect
from rerail.statistics.statistic import StatisticSet

DISTANCES = ("weight", "mean_output", "routed_output", "router_row")


def filled(model: MoEModel) -> StatisticSet:
    ids = tokens(6, 24)
    wanted = [s for d in DISTANCES for s in ConMoE(distance=d).requires]
    return collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], wanted)


def plan_of(model: MoEModel, method: ConMoE, removed: float = 0.5) -> Plan:
    return make_plan(method, model.layers, filled(model), Ratio(removed), Uniform())


def owners(plan: Plan) -> dict[tuple[int, int], tuple[int, int]]:
    """Return who answers each (layer, expert)."""
    found = {}
    for part in plan.layers:
        for e, stored in enumerate(part.slots):
            [(layer, expert, _)] = part.bank.members[stored]
            found[part.layer, e] = layer, expert
    return found


def one_distance(model: MoEModel, a: int, b: int, layer: int = 0) -> float:
    total = 0.0
    for p, q in zip(model.layers[layer].expert(a), model.layers[layer].expert(b), strict=True):
        total += float(2 * (p - q).norm() / (p.norm() + q.norm()))
    return total / 3


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_weight_distances_are_those_of_the_formula(family):
    model = tiny(family)
    found = between_weights([model.layers[0].stack()])
    for a, b in ((0, 1), (3, 7), (5, 2)):
        assert float(found[a, b]) == pytest.approx(one_distance(model, a, b), rel=1e-5)
    assert torch.equal(found, found.T)
    assert (found.diagonal() == 0).all()
    assert (found >= 0).all()
    assert (found <= 2).all()


def test_opposite_experts_are_farthest_and_equal_or_zero_ones_are_nearest():
    one = torch.randn(4, 3, generator=torch.manual_seed(0))
    stack = torch.stack([one, -one, one, torch.zeros(4, 3), torch.zeros(4, 3)])
    found = between_weights([ExpertWeights(stack, stack, stack.mT)])
    assert found[0, 1] == pytest.approx(2)
    assert found[0, 2] == found[3, 4] == 0
    assert torch.isfinite(found).all()
    rows = torch.randn(5, 7, generator=torch.manual_seed(1))
    torch.testing.assert_close(between_rows(rows), torch.cdist(rows.double(), rows.double()))
    twins = torch.cat([rows.double(), rows.double() * (1 + 1e-9)])
    assert between_rows(twins)[:5, 5:].diagonal().count_nonzero() == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_prototypes_have_the_highest_scores_and_answer_their_nearest(family, distance):
    model, method = tiny(family), ConMoE(distance=distance)
    view = filled(model).of(model.layers[0], method.requires)
    apart = method.distances(model.layers[:1], [view])
    hard = torch.stack([min(apart[e, b] for b in range(8) if b != e) for e in range(8)])
    score = minmax(method.compared(model.layers[0], view)) * minmax(hard)
    order = sorted(range(8), key=lambda e: (-float(score[e]), e))
    pool = sorted(order[:4])
    found = owners(plan_of(model, method))
    for e in range(8):
        nearest = min(pool, key=lambda p: (float(apart[e, p]), p))
        assert found[0, e] == (0, e if e in pool else nearest)


def test_ties_go_to_the_lower_id():
    model, method = tiny("qwen3_moe"), ConMoE()
    view = filled(model).of(model.layers[0], method.requires)

    class Even(ConMoE):
        def distances(self, layers, statistics):
            even = torch.ones(8, 8, dtype=torch.float64).fill_diagonal_(0)
            even[1, 2] = even[2, 1] = 0  # equal prototypes still answer themselves
            return even

        def score(self, contribution, distances):
            return torch.ones(8)

    [decision] = Even().decide(model.layers[:1], [view], [3])
    part = decision.plan
    assert [m[0][1] for m in part.bank.members] == [0, 1, 2]
    assert part.slots == (0, 1, 2, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_router_gates_and_choices_stay_and_the_teacher_is_read(family):
    model = tiny(family)
    plan = plan_of(model, ConMoE())
    student, seen = apply_plan(model, plan), []
    for one in (model, student):
        hook = one.layers[0].experts.register_forward_pre_hook(lambda _, args: seen.append(args))
        with torch.no_grad():
            one.hidden(tokens(2, 12))
        hook.remove()
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)
    for mine, theirs in zip(student.layers, model.layers, strict=True):
        assert mine.router_rows is theirs.router_rows
        for name, parameter in theirs.experts.named_parameters():
            assert mine.experts.shell.get_parameter(name) is parameter


def test_every_prototype_answers_itself_and_is_used():
    plan = plan_of(tiny("qwen3_moe"), ConMoE(), 0.625)
    found = owners(plan)
    pool = set(found.values())
    assert all(found[p] == p for p in pool)
    assert len(pool) == 2 * 3
    assert [part.bank.stored for part in plan.layers] == [3, 3]


def test_equal_experts_are_merged_at_no_loss():
    model = tiny("qwen3_moe")
    for layer in model.layers:
        for parameter in layer.experts.parameters():
            parameter.data[4:] = parameter.data[:4]
    plan = plan_of(model, ConMoE(native=1))
    apart = between_weights([model.layers[0].stack()])
    assert (apart[torch.arange(4), torch.arange(4, 8)] == 0).all()
    spec_owners = {e: e % 4 for e in range(8)}
    parts = [
        part.__class__(
            part.layer,
            part.kept,
            tuple(spec_owners[e] for e in range(8)),
            "untouched",
            part.bank.__class__("dense", 4, tuple(((part.layer, e, 1.0),) for e in range(4))),
        )
        for part in plan.layers
    ]
    student = apply_plan(model, Plan(tuple(parts)))
    ids = tokens(2, 12)
    torch.testing.assert_close(
        student.model(ids).logits, model.model(ids).logits, atol=1e-5, rtol=1e-5
    )


def test_summed_gates_compute_the_same_as_two_slots_of_one_prototype():
    model = tiny("qwen3_moe")
    bank = apply_plan(model, plan_of(model, ConMoE(), 0.875)).layers[0].experts
    hidden, index = torch.randn(6, 16), torch.tensor([[0, 5]]).expand(6, 2)
    weights = torch.rand(6, 2)
    once = torch.cat([weights.sum(dim=1, keepdim=True), torch.zeros(6, 1)], dim=1)
    torch.testing.assert_close(
        bank(hidden, index, weights), bank(hidden, index, once), atol=1e-5, rtol=1e-5
    )


def test_a_window_shares_one_pool_that_is_counted_once():
    model = tiny("qwen3_moe")
    plan = plan_of(model, ConMoE(window=2))
    found = owners(plan)
    pool = set(found.values())
    assert len(pool) == 8
    assert any(layer != owner[0] for (layer, _), owner in found.items())
    student = apply_plan(model, plan)
    assert Sizes.of(student, 2) == Sizes.predicted(model, plan, 2)
    assert Sizes.of(student, 2).routed == 8 * model.layers[0].expert_size
    for (layer, e), (source, expert) in found.items():
        mine, theirs = student.layers[layer].expert(e), model.layers[source].expert(expert)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_window_of_one_layer_is_the_plan_of_that_layer():
    model = tiny("qwen3_moe")
    assert plan_of(model, ConMoE(window=1)).layers == plan_of(model, ConMoE()).layers
    assert ConMoE(window=2).scopes([*model.layers, *model.layers[:1]]) == [[0, 1], [2]]


def test_each_layer_has_its_own_prototypes_where_it_must():
    model = tiny("qwen3_moe")
    plain = ConMoE(window=2)
    view = [filled(model).of(layer, plain.requires) for layer in model.layers]

    class Leaning(ConMoE):
        def score(self, contribution, distances):
            return torch.arange(16.0)

    for native, counts in ((0, [0, 4]), (1, [1, 3]), (2, [2, 2])):
        decisions = Leaning(window=2, native=native).decide(model.layers, view, [2, 2])
        pool = {m[0][:2] for decision in decisions for m in decision.plan.bank.members}
        assert [sum(layer == i for layer, _ in pool) for i in (0, 1)] == counts


def test_fusing_averages_all_that_a_prototype_answers():
    model = tiny("qwen3_moe")
    plain, fused = (plan_of(model, ConMoE(fuse=f), 0.75) for f in (False, True))
    for a, b in zip(plain.layers, fused.layers, strict=True):
        assert a.slots == b.slots
        for stored, group in enumerate(b.bank.members):
            slots = [e for e in range(8) if a.slots[e] == stored]
            assert [e for _, e, _ in group] == slots
            assert sum(w for _, _, w in group) == pytest.approx(1)
    student, (layer, *_) = apply_plan(model, fused), fused.layers
    group = [e for e in range(8) if layer.slots[e] == layer.slots[0]]
    expected = torch.stack([model.layers[0].expert(e).up for e in group]).mean(dim=0)
    torch.testing.assert_close(student.layers[0].expert(0).up, expected, atol=1e-6, rtol=1e-5)


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="window=0 must be at least 1"):
        ConMoE(window=0)
    model = tiny("qwen3_moe")
    with pytest.raises(OutOfReach, match=r"allowed ratios: 0 to 0\.625"):
        ConMoE(native=3).check(model.layers, Ratio(0.75), Uniform())
    other = tiny("qwen3_moe", moe_intermediate_size=12).layers[1]
    with pytest.raises(OutOfReach, match="cannot share experts"):
        ConMoE(window=2).check([model.layers[0], other], Ratio(0.5), Uniform())


def test_layers_may_share_the_pool_unevenly_by_their_contributions():
    model = tiny("qwen3_moe")
    plan = make_plan(ConMoE(), model.layers, filled(model), Ratio(0.5), GlobalScore())
    assert sum(plan.lineage["counts"]) == 8
    assert [part.bank.stored for part in plan.layers] == plan.lineage["counts"]
