"""PuzzleMoE: masks and magnitudes of pairs, who is paired, sizes on disk, and who may read them."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import rerail.auto  # noqa: F401
from families import tiny, tokens
from measuring import batches
from rerail.compress.base import make_plan
from rerail.compress.solvers.pairing import annealed_pairs, shared_magnitudes
from rerail.errors import InputError, OutOfReach
from rerail.experts.puzzle import Shared, tensors_of
from rerail.experts.quantized import Coded, dequantised, unpack
from rerail.export.targets import export_student
from rerail.methods.puzzle_moe import PuzzleMoE
from rerail.moe.model import MoEModel
from rerail.plan.allocation import GlobalScore, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect
from rerail.statistics.routed import Count
from rerail.statistics.squares import InputSquares, MiddleSquares
from rerail.statistics.statistic import StatisticSet

ONES = (torch.ones(1), torch.ones(1))


def gaussians(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.02 * torch.randn(shape, generator=generator) for _ in range(2)]


def made_of(shared: Shared) -> list[torch.Tensor]:
    signs = 1 - 2 * shared.signs.to(shared.magnitude)
    return list(signs * shared.masks * shared.magnitude)


def error(first: torch.Tensor, second: torch.Tensor, tau: float) -> float:
    made = torch.stack(made_of(shared_magnitudes(first, second, ONES, tau)))
    whole = torch.stack([first, second])
    return float((made - whole).norm() / whole.norm())


def plan_of(model: MoEModel, method: PuzzleMoE, ratio: float = 0.5) -> Plan:
    filled = collect(model, batches(), method.requires)
    return make_plan(method, model.layers, filled, Ratio(ratio), Uniform())


def test_gaussian_pairs_share_and_lose_what_the_integrals_say() -> None:
    first, second = gaussians(1500, 1500)
    shared = shared_magnitudes(first, second, ONES, 0.4)
    both = (shared.masks[0] & shared.masks[1]).float().mean()
    expected = 2 / math.pi * (math.atan(1.4 / 0.6) - math.atan(0.6 / 1.4))
    assert float(both) == pytest.approx(expected, abs=0.005)
    assert shared.masks.float().mean(dim=(1, 2)).tolist() == pytest.approx([0.741] * 2, abs=0.003)
    errors = {tau: error(first, second, tau) for tau in (0.0, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)}
    assert errors[0.4] == pytest.approx(0.2235, abs=0.002)
    assert min(errors, key=errors.get) == 0.4
    assert errors[0.0] == pytest.approx(0.426, abs=0.003)
    assert errors[1.0] == pytest.approx(0.426, abs=0.003)


def test_at_least_one_of_a_pair_keeps_every_element_and_signs_are_the_experts_own() -> None:
    first, second = gaussians(40, 50)
    first[0, :9], second[0, :5] = 0, 0
    shared = shared_magnitudes(first, second, (torch.rand(50), torch.rand(50)), 0.4)
    assert torch.equal(shared.masks[0] | shared.masks[1], shared.magnitude > 0)
    assert not shared.masks[:, 0, :5].any()
    for own, made in zip((first, second), made_of(shared), strict=True):
        kept = made != 0
        assert torch.equal(made[kept].sign(), torch.where(own[kept].signbit(), -1.0, 1.0))


def test_tau_one_averages_all_and_tau_zero_lets_one_win() -> None:
    first, second = gaussians(40, 50)
    second[3] = -first[3]
    everything = shared_magnitudes(first, second, ONES, 1.0)
    assert everything.masks.all()
    torch.testing.assert_close(everything.magnitude, (first.abs() + second.abs()) / 2)
    nothing = shared_magnitudes(first, second, ONES, 0.0)
    equal = first.abs() == second.abs()
    assert equal[3].all()
    assert torch.equal(nothing.masks[0] & nothing.masks[1], equal)
    assert torch.equal(nothing.magnitude, torch.maximum(first.abs(), second.abs()))


def test_swapping_a_pair_swaps_the_result_but_for_ties() -> None:
    first, second = gaussians(40, 50)
    norms = (torch.rand(50), torch.rand(50))
    one = shared_magnitudes(first, second, norms, 0.4)
    other = shared_magnitudes(second, first, norms[::-1], 0.4)
    assert torch.equal(one.magnitude, other.magnitude)
    assert torch.equal(one.masks, other.masks.flip(0))
    tie = shared_magnitudes(torch.ones(1, 1), 3 * torch.ones(1, 1), (3 * ONES[0], ONES[0]), 0.1)
    assert tie.masks.flatten().tolist() == [True, False]
    assert float(tie.magnitude) == 1


@pytest.mark.parametrize("turned", [1, -1])
def test_an_expert_and_its_copy_or_negative_lose_nothing(turned: int) -> None:
    model = tiny("qwen3_moe")
    for layer in model.layers:
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.experts, name)
            weight.copy_(weight.to(torch.bfloat16))
            weight[abs(weight) < 2**-15] = 2**-15
            weight[[0, 2, 4, 6]] = turned * weight[[1, 3, 5, 7]]
    method = PuzzleMoE(norm="none")
    decided = method.decide_layer(model.layers[0], StatisticSet().of(model.layers[0], ()), 8)
    assert decided.plan.bank.each("pairs") == ()
    for layer in model.layers:
        spec = method.spec(layer, (0, 1, 3, 2, 4, 5, 7, 6))
        for name, stack in layer.stack()._asdict().items():
            for p in range(4):
                i, j = spec.each("pairs")[2 * p : 2 * p + 2]
                shared = shared_magnitudes(stack[i], stack[j], ONES, 0.4)
                assert torch.equal(torch.stack(made_of(shared)), stack[[i, j]]), name


def test_the_norms_are_those_of_the_inputs_and_a_busier_expert_wins_more() -> None:
    model = tiny("qwen3_moe")
    layer, method = model.layers[0], PuzzleMoE()
    filled = collect(model, batches(), [InputSquares(), MiddleSquares(), Count()])
    view = filled.of(layer, method.requires)
    tensors = filled.tensors[0]
    assert torch.equal(method.norms(view, "up", (3, 5)), tensors["input_squares"][[3, 5]].sqrt())
    assert torch.equal(method.norms(view, "down", (3, 5)), tensors["middle_squares"][[3, 5]].sqrt())
    mean = PuzzleMoE(norm="mean")
    found = mean.norms(filled.of(layer, mean.requires), "up", (3, 5))
    count = tensors["count"][[3, 5]].unsqueeze(1)
    torch.testing.assert_close(found, (tensors["input_squares"][[3, 5]] / count).sqrt())
    busy = [e for e in range(8) if tensors["count"][e] > 0][:2]
    for name in ("input_squares", "middle_squares"):
        tensors[name][busy[0]] *= 100
    shared = [method.merge(view, "up", tuple(busy), layer.stack().up[busy])]
    assert shared[0].masks[0].sum() > shared[0].masks[1].sum()


def test_experts_without_tokens_lose_and_two_of_them_compare_their_weights() -> None:
    model = tiny("qwen3_moe")
    layer, method = model.layers[0], PuzzleMoE()
    filled = collect(model, batches(), method.requires)
    for name in ("input_squares", "middle_squares"):
        filled.tensors[0][name][[2, 6]] = 0
        filled.tensors[0][name][0] = 1
    view, up = filled.of(layer, method.requires), layer.stack().up
    lost = method.merge(view, "up", (2, 0), up[[2, 0]])
    similar = shared_magnitudes(up[2], up[0], ONES, 0.4).masks.all(dim=0)
    assert torch.equal(lost.masks[0], similar)
    alone = method.merge(view, "up", (2, 6), up[[2, 6]])
    assert torch.equal(alone.masks, shared_magnitudes(up[2], up[6], ONES, 0.4).masks)
    assert torch.isfinite(torch.stack(made_of(alone))).all()


def test_without_norms_it_is_the_plan_of_equal_norms() -> None:
    model = tiny("qwen3_moe")
    filled = collect(model, batches(), PuzzleMoE().requires)
    for tensors in filled.tensors.values():
        for tensor in tensors.values():
            tensor.fill_(7.0)
    equal = make_plan(PuzzleMoE(), model.layers, filled, Ratio(0.5), Uniform())
    plain = make_plan(PuzzleMoE(norm="none"), model.layers, StatisticSet(), Ratio(0.5), Uniform())
    assert equal.layers == plain.layers
    assert all(torch.equal(equal.tensors[n], t) for n, t in plain.tensors.items())


@pytest.mark.parametrize(("ratio", "pairs"), [(0.125, 1), (0.25, 2), (0.3, 2), (0.5, 4)])
def test_a_ratio_is_so_many_pairs_and_the_others_stay_as_they_are(ratio, pairs) -> None:
    model = tiny("qwen3_moe")
    plan = plan_of(model, PuzzleMoE(), ratio)
    assert plan.lineage["achieved"] == pairs / 8
    student = apply_plan(model, plan)
    for part, layer, now in zip(plan.layers, model.layers, student.layers, strict=True):
        paired = part.bank.each("pairs")
        assert len(paired) == len(set(paired)) == 2 * pairs
        for e in set(range(8)) - set(paired):
            for own, found in zip(layer.expert(e), now.expert(e), strict=True):
                assert torch.equal(own, found)


def test_seeds_draw_other_pairs_and_the_least_used_can_be_chosen() -> None:
    model = tiny("qwen3_moe")
    draws = {plan_of(model, PuzzleMoE(seed=s), 0.25).layers[0].bank.each("pairs") for s in range(6)}
    assert len(draws) > 3
    method = PuzzleMoE(pairs="least")
    counts = collect(model, batches(), [Count()]).tensors[0]["count"]
    chosen = plan_of(model, method, 0.25).layers[0].bank.each("pairs")
    assert set(chosen) == set(counts.argsort(stable=True)[:4].tolist())


def test_searched_pairs_are_found_where_copies_hide() -> None:
    model = tiny("qwen3_moe")
    layer = model.layers[0]
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(layer.experts, name)
        weight[[5, 3, 7, 2]] = weight[[0, 1, 4, 6]]
    method = PuzzleMoE(norm="none", pairs="searched")
    paired = method.paired(layer, StatisticSet().of(layer, ()), 4)
    found = {frozenset(paired[i : i + 2]) for i in range(0, 8, 2)}
    assert found == {frozenset(p) for p in ((5, 0), (3, 1), (7, 4), (2, 6))}


def test_annealing_never_ends_worse_and_asks_for_each_pair_once() -> None:
    generator, asked = torch.Generator().manual_seed(1), []
    costs = torch.rand(12, 12, generator=generator)

    def cost(a: int, b: int) -> float:
        asked.append(frozenset((a, b)))
        return float(costs[min(a, b), max(a, b)])

    start = list(range(12))
    for steps in (0, 1, 30, 300):
        asked.clear()
        found = annealed_pairs(start, cost, generator, steps)
        assert len(asked) == len(set(asked))
        total = sum(cost(*found[i : i + 2]) for i in range(0, 12, 2))
        assert sorted(found) == start
        assert total <= sum(cost(i, i + 1) for i in range(0, 12, 2)) + 1e-9
    assert total < 0.6 * sum(cost(i, i + 1) for i in range(0, 12, 2))


@pytest.mark.parametrize("store", ["words", "codes"])
def test_the_saved_file_holds_the_bytes_that_were_planned(store: str, tmp_path) -> None:
    model = tiny("qwen3_moe", hidden_size=64, moe_intermediate_size=32, head_dim=32)
    plan = plan_of(model, PuzzleMoE(store=store, group=32))
    student = apply_plan(model, plan)
    path = export_student(student, plan, tmp_path / "m", form="package", dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    solved = {n: t for n, t in tensors.items() if ".experts." in n and "_" in n.rsplit(".", 1)[1]}
    solved = {n: t for n, t in solved.items() if not n.endswith("_proj")}
    saved = sum(t.numel() * t.itemsize for t in solved.values())
    assert 8 * saved == plan.stored_bits(model.layers, 16)
    dense = 2 * 8 * 3 * 64 * 32 * 16
    assert 1 - 8 * saved / dense == pytest.approx(plan.lineage["achieved"])
    if store == "words":
        assert plan.lineage["achieved"] == 0.5
        words = [t for n, t in tensors.items() if n.endswith("_words")]
        assert len(words) == 6
        assert {t.dtype for t in words} == {torch.int16}
        assert not any(t.dtype == torch.bfloat16 and t.numel() for t in solved.values())
    else:
        assert 0.375 < plan.lineage["achieved"] <= 0.5


def test_words_can_be_read_as_weights_by_nobody(tmp_path, monkeypatch) -> None:
    model = tiny("qwen3_moe")
    plan = plan_of(model, PuzzleMoE())
    student = apply_plan(model, plan)
    path = export_student(student, plan, tmp_path / "m", form="package")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, student.model(tokens()).logits)
    with pytest.raises(RuntimeError, match="mismatch"):
        type(model.model).from_pretrained(path)
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="does not recognize this architecture"):
            auto.from_pretrained(path)


def test_three_bits_of_magnitude_are_better_without_a_sign() -> None:
    first, second = gaussians(256, 512)
    method = PuzzleMoE(store="codes")
    model = tiny("qwen3_moe", hidden_size=64)
    shared = shared_magnitudes(first, second, ONES, 0.4)
    one = Shared(shared.magnitude[None], shared.signs[:, None], shared.masks[:, None])
    parts = tensors_of(one, method.spec(model.layers[0], (0, 1)), torch.float32, "up")
    assert sum(t.numel() * t.itemsize for t in parts.values()) * 8 / first.numel() == (
        pytest.approx(3 + 2 + 1.6 + 32 / 128, abs=0.01)
    )
    codes = unpack(parts["codes"], 3, first.numel()).view(1, *first.shape)
    assert int(codes.max()) == 7
    made = dequantised(Coded(codes, parts["scale"], torch.zeros_like(parts["scale"])), 128)
    found = torch.stack(made_of(one._replace(magnitude=made)))[:, 0]
    whole = torch.stack([first, second])
    assert float((found - whole).norm() / whole.norm()) == pytest.approx(0.248, abs=0.006)


def test_what_is_raised_to_the_least_number_is_said() -> None:
    model = tiny("qwen3_moe")
    for layer in model.layers:
        layer.experts.down_proj.mul_(1e-5)
    plan = plan_of(model, PuzzleMoE())
    assert "33." in plan.lineage["notes"][0]
    assert "% of shared magnitudes were raised to 2^-15" in plan.lineage["notes"][0]
    assert "notes" not in plan_of(model, PuzzleMoE(store="float"), 0.25).lineage


def test_bad_settings_weights_and_ratios_are_refused() -> None:
    model = tiny("qwen3_moe")
    with pytest.raises(InputError, match=r"tau=1.2 is outside \[0, 1\]"):
        PuzzleMoE(tau=1.2)
    with pytest.raises(InputError, match=r"bits=9 must be 1 to 8"):
        PuzzleMoE(bits=9)
    with pytest.raises(OutOfReach, match=r"make 4 that save 1 each; allowed ratios: 0 to 0\.5"):
        PuzzleMoE().check(model.layers, Ratio(0.7), Uniform())
    with pytest.raises(OutOfReach, match=r"save 0\.75 each; allowed ratios: 0 to 0\.375"):
        PuzzleMoE(store="float").check(model.layers, Ratio(0.5), Uniform())
    with pytest.raises(OutOfReach, match="counts experts, and PuzzleMoE keeps them all"):
        PuzzleMoE().check(model.layers, Ratio(0.5), GlobalScore())
    model.layers[1].experts.down_proj[4, 2, 3] = 3e5
    with pytest.raises(InputError, match=r"layer 1: down of experts .*4.* magnitude 300000, which"):
        plan_of(model, PuzzleMoE())
