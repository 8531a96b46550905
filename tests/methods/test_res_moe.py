import functools

import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import extended, make_plan
from rerail.compress.solvers.alignment import channel_features, permuted
from rerail.compress.solvers.blending import blended
from rerail.errors import OutOfReach
from rerail.experts.residual import mask_bits
from rerail.methods.res_moe import ResMoE
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio, dense_numbers, numbers_kept
from rerail.plan.plan import Plan
from rerail.plan.sizes import Sizes
from rerail.statistics.statistic import LayerStatistics, StatisticSet

FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral"]
NOTHING = LayerStatistics({}, ())
FULL = 10**9


def planned(method: ResMoE, model: MoEModel, removed: float = 0.5) -> Plan:
    return make_plan(method, model.layers, StatisticSet(), Ratio(removed), Uniform())


def exact(method: ResMoE, model: MoEModel) -> Plan:
    decisions = method.decide(model.layers, [NOTHING] * 2, [FULL] * 2)
    return extended(Plan(), decisions)


def in_float64(family: str) -> MoEModel:
    model = tiny(family)
    model.model.to(torch.float64)
    model.model.set_experts_implementation("eager")
    return model


def shuffle(layer: MoELayer, slots: list[int], seed: int = 0) -> None:
    """Put the channels of some experts into another order: the same functions."""
    generator, own = torch.Generator().manual_seed(seed), expert_parameters(layer.experts)
    for e in slots:
        order = torch.randperm(layer.intermediate_size, generator=generator)
        expert = {name: p.data[e] for name, p in own.items()}
        for name, tensor in permuted(expert, layer.layout, order).items():
            own[name].data[e] = tensor


def gap(model: MoEModel, student: MoEModel) -> float:
    with torch.no_grad():
        return float((student.hidden(tokens()) - model.hidden(tokens())).abs().max())


def residuals(model: MoEModel, layer: int = 0) -> torch.Tensor:
    """Return the residuals (E, 3, I, H) of the plan that loses nothing."""
    return unpacked(exact(ResMoE(), model).of_layer(layer))


def unpacked(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    shape = tensors["base"].shape
    whole = torch.zeros(8, 3, shape[1] * shape[2], dtype=tensors["values"].dtype)
    whole[mask_bits(tensors["mask"], whole.shape[2])] = tensors["values"].flatten()
    return whole.view(8, *shape)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["up", "svd"])
@pytest.mark.parametrize("align", ["barycentre", "first", "none"])
def test_whole_residuals_lose_nothing(family: str, kind: str, align: str) -> None:
    model = in_float64(family)
    student = apply_plan(model, exact(ResMoE(kind=kind, align=align), model))
    assert gap(model, student) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_add_up_to_zero_around_the_centre(family: str) -> None:
    model = in_float64(family)
    found = residuals(model)
    assert float(found.sum(dim=0).abs().max()) < 1e-12
    assert float(found.abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["up", "svd"])
def test_copies_in_another_order_leave_no_residual(kind: str) -> None:
    model = in_float64("gpt_oss")
    for layer in model.layers:
        for parameter in expert_parameters(layer.experts).values():
            parameter.data[:] = parameter.data[:1].clone()
        shuffle(layer, [1, 2, 5])
    plan = planned(ResMoE(kind=kind), model, 0.6)
    assert gap(model, apply_plan(model, plan)) < 1e-9
    assert float(plan.tensors["layers.0.values" if kind == "up" else "layers.0.V"].norm()) < 1e-9
    plain = apply_plan(model, planned(ResMoE(kind=kind, align="none"), model, 0.6))
    assert gap(model, plain) > 1e-3


@pytest.mark.parametrize("kind", ["up", "svd"])
def test_the_order_of_channels_does_not_matter(kind: str) -> None:
    model, other = in_float64("gpt_oss"), in_float64("gpt_oss")
    for layer in other.layers:
        shuffle(layer, [3, 4, 7])
    first, second = (apply_plan(m, planned(ResMoE(kind=kind), m)) for m in (model, other))
    for a, b in zip(first.layers, second.layers, strict=True):
        here, there = a.experts.dense(), b.experts.dense()
        assert all(float((here[n] - there[n]).abs().max()) < 1e-12 for n in here)


def test_without_alignment_the_centre_is_the_mean() -> None:
    model = tiny("qwen3_moe")
    base = planned(ResMoE(align="none"), model).tensors["layers.0.base"]
    gate, up, down = model.layers[0].stack()
    even = torch.ones(8).double() / 8
    expected = [blended(gate, even, None), blended(up, even, None), blended(down, even, None).mT]
    torch.testing.assert_close(base, torch.stack(expected))


def test_a_centre_that_follows_the_channels_is_nearer_than_one_match_or_none() -> None:
    model = tiny("qwen3_moe")
    for layer in model.layers:  # experts that are alike but for the order of channels and noise
        for parameter in expert_parameters(layer.experts).values():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.data[:] = parameter.data[:1] + 0.15 * noise
        shuffle(layer, [1, 2, 3, 4, 5, 6, 7])
    layer = model.layers[0]
    sizes = {"values": layer.dims.expert}
    norms = [
        float(ResMoE(align=align).factor(layer, NOTHING, sizes)["values"].norm())
        for align in ("barycentre", "first", "none")
    ]
    assert norms[0] <= norms[1]
    assert norms[1] < 0.8 * norms[2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("removed", [0.1, 0.5, 0.7])
def test_bits_are_those_of_the_formula_and_every_expert_has_k_entries(
    family: str, removed: float
) -> None:
    model = tiny(family)
    n, p, d, _ = model.layers[0].dims
    entries, dense = 3 * p * d, dense_numbers(model.layers[0])
    plan = planned(ResMoE(), model, removed)
    k = plan.layers[0].bank.integers["values"]
    assert entries % 16 == 0
    kept = numbers_kept(dense, removed) - (dense - n * entries)  # biases stay
    assert k == min((16 * kept - 16 * entries - n * entries) // (16 * n), entries)
    bits = 16 * entries + n * (entries + 16 * k) + 16 * (dense - n * entries)
    for layer in apply_plan(model, plan).layers:
        bank = layer.experts
        assert sum(bank.stored_bits(16).values()) == bits <= 16 * numbers_kept(dense, removed)
        assert mask_bits(bank.solved("mask"), p * d).sum(dim=(1, 2)).tolist() == [k] * n
    if removed == 0.5:  # in float32 a bit of the mask is still a bit
        size = Sizes.of(apply_plan(model, plan), 4)
        assert size.routed_bytes == 2 * (4 * (bits // 16 - n * entries // 16) + n * entries // 8)


def test_the_largest_entries_stay() -> None:
    model = tiny("qwen3_moe")
    whole = residuals(model).flatten(1)
    plan = planned(ResMoE(), model)
    made, k = unpacked(plan.of_layer(0)).flatten(1), plan.layers[0].bank.integers["values"]
    for e in range(8):
        smallest = whole[e].abs().sort(descending=True).values[k - 1]
        assert torch.equal(made[e], whole[e].where(whole[e].abs() >= smallest, 0))


def test_low_rank_residuals_lose_what_their_spectra_drop() -> None:
    model = in_float64("qwen3_moe")
    whole, plan = residuals(model), planned(ResMoE(kind="svd"), model)
    ranks, tensors = plan.layers[0].bank.integers["rank"], plan.of_layer(0)
    assert max(ranks) - min(ranks) <= 1
    parts = zip(tensors["U"].split(ranks, 1), tensors["V"].split(ranks, 1), strict=True)
    for e, (u, v) in enumerate(parts):
        cloud = torch.cat(list(whole[e]), dim=1)
        dropped = torch.linalg.svdvals(cloud)[ranks[e] :].square().sum()
        torch.testing.assert_close((whole[e] - u @ v).square().sum(), dropped)


def test_one_expert_is_its_own_centre() -> None:
    model = tiny("qwen3_moe", num_experts=1, num_experts_per_tok=1)
    layer = model.layers[0]
    tensors = ResMoE().factor(layer, NOTHING, {"values": 5})
    expert = {name: p[0] for name, p in expert_parameters(layer.experts).items()}
    cloud = torch.cat(list(tensors["base"]), dim=1)
    assert torch.equal(cloud, channel_features(expert, layer.layout))
    assert not tensors["values"].any()


def test_it_reads_no_text() -> None:
    assert ResMoE().requires == ResMoE(kind="svd").requires == ()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("kind", ["up", "svd"])
def test_the_reach_that_is_named_is_the_reach(family: str, kind: str) -> None:
    layer, method = tiny(family).layers[0], ResMoE(kind=kind)
    with pytest.raises(OutOfReach, match="ratios from 0 to") as refused:
        method.sizes(layer, numbers_kept(dense_numbers(layer), 0.95))
    reach = float(str(refused.value).split("ratios from 0 to ")[1].split()[0])
    assert method.sizes(layer, numbers_kept(dense_numbers(layer), reach - 1e-3))
    with pytest.raises(OutOfReach):
        method.sizes(layer, numbers_kept(dense_numbers(layer), reach + 1e-3))
    if kind == "up" and family == "qwen3_moe":
        assert reach == pytest.approx(1 - 1 / 8 - 1 / 16, abs=3e-3)


@functools.cache
def errors(kind: str) -> list[float]:
    model, found = tiny("mixtral"), []
    for removed in (0.2, 0.5, 0.8):
        student = apply_plan(model, planned(ResMoE(kind=kind), model, removed))
        found.append(gap(model, student))
    return found


@pytest.mark.parametrize("kind", ["up", "svd"])
def test_more_numbers_are_closer(kind: str) -> None:
    assert errors(kind) == sorted(errors(kind))
