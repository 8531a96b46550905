"""CAMERA-Q: classes by energy, bits with scales, the order of GPTQ, and its limits."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from families import tiny, tokens
from measuring import Seen, batches
from rerail.compress.base import make_plan
from rerail.compress.sequential import sequential
from rerail.compress.solvers.channel_classes import best_classes, bits_by_rank, counts_by_shares
from rerail.compress.solvers.energy import micro_expert_energy
from rerail.compress.solvers.rounding import inverse_root, round_in_turn, round_to_nearest
from rerail.errors import InputError, OutOfReach
from rerail.experts.packed_channels import channel_classes
from rerail.experts.quantized import dequantised
from rerail.export.targets import export_student
from rerail.methods.camera import Camera
from rerail.methods.camera_q import CameraQ
from rerail.methods.gptq import GPTQ
from rerail.methods.hqq import HQQ
from rerail.methods.rtn import RTN
from rerail.moe.fused_experts import ExpertWeights
from rerail.moe.model import MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Bits, Budget, Ratio
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect
from rerail.statistics.statistic import StatisticSet

ROUND = RTN(group=8)
BIG = {"hidden_size": 64, "moe_intermediate_size": 32, "head_dim": 32}


def plan_of(model: MoEModel, method: CameraQ | Camera | RTN, budget: Budget) -> Plan:
    filled = collect(model, batches(), method.requires)
    return make_plan(method, model.layers, filled, budget, Uniform())


def logits(model: MoEModel) -> torch.Tensor:
    with torch.no_grad():
        return model.model(tokens()).logits


def bits_of(model: MoEModel, method: CameraQ, average: float, index: int = 0) -> tuple:
    """Return energies and bits of a layer's channels, (E, I) each."""
    layer = model.layers[index]
    filled = collect(model, batches(), method.requires)
    energy = micro_expert_energy(layer, filled.of(layer, method.requires), method.alpha)
    count = method.count(layer, 1 - average / 16)
    return energy, bits_by_rank(energy, best_classes(energy, method.costs(layer), count))


def test_one_class_is_round_to_nearest_of_gate_and_up_bit_for_bit() -> None:
    model = tiny("qwen3_moe")
    mine = apply_plan(model, plan_of(model, CameraQ(quantiser=ROUND, bits=(4,)), Bits(8)))
    theirs = apply_plan(model, plan_of(model, ROUND, Bits(4)))
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        assert torch.equal(a.stack().gate, b.stack().gate)
        assert torch.equal(a.stack().up, b.stack().up)
        expected = dequantised(round_to_nearest(model.layers[a.index].stack().down.mT, 4, 8), 8)
        assert torch.equal(a.stack().down, expected.mT)


def test_sixteen_bits_and_none_are_camera_of_the_same_share() -> None:
    model = tiny("qwen3_moe", **BIG)
    mine = plan_of(model, CameraQ(quantiser=ROUND, bits=(16, 0)), Bits(8))
    theirs = plan_of(model, Camera(), Ratio(0.5))
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        assert channel_classes(a.bank) == {16: b.bank.each("widths")}
        for name in ("gate", "up", "down"):
            key = f"layers.{a.layer}.{name}"
            assert torch.equal(mine.tensors[f"{key}.b16.dense"], theirs.tensors[key])
    torch.testing.assert_close(*(logits(apply_plan(model, plan)) for plan in (mine, theirs)))
    assert mine.lineage["achieved"] == theirs.lineage["achieved"] == 0.5


@pytest.mark.parametrize("quantiser", [RTN(), HQQ(), GPTQ()])
def test_all_channels_in_sixteen_bits_are_the_model_itself(quantiser) -> None:
    model = tiny("qwen3_moe")
    method = CameraQ(quantiser=quantiser, bits=(16, 2), shares=(1.0, 0.0))
    view = collect(model, batches(), method.requires).of(model.layers[0], method.requires)
    decided = method.decide_layer(model.layers[0], view, 0)
    assert channel_classes(decided.plan.bank) == {16: (8,) * 8}
    for name, stack in model.layers[0].stack()._asdict().items():
        rows = stack.mT if name == "down" else stack
        assert torch.equal(decided.tensors[f"{name}.b16.dense"], rows.flatten(0, 1))


def test_the_order_of_classes_alone_changes_nothing() -> None:
    model = tiny("qwen3_moe")
    for layer in model.layers:  # numbers that eight bits hold exactly, in any class of 8 or 16
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.experts, name)
            weight.copy_((weight * 50).round().clamp(-100, 100))
            weight[..., :1], weight[..., 1:2] = -100, 155
            weight[:, :1], weight[:, 1:2] = -100, 155
    plan = plan_of(model, CameraQ(quantiser=RTN(group=64), bits=(16, 8)), Bits(13))
    widths = channel_classes(plan.layers[0].bank)
    assert min(map(sum, widths.values())) > 8
    student = apply_plan(model, plan)
    x, generator = torch.randn(30, 16) / 50, torch.Generator().manual_seed(0)
    index, gates = torch.randint(0, 8, (30, 2), generator=generator), torch.rand(30, 2)
    torch.testing.assert_close(
        student.layers[0].experts(x, index, gates), model.layers[0].experts(x, index, gates)
    )


@pytest.mark.parametrize("average", [2.5, 3, 4, 6.5])
@pytest.mark.parametrize("bits", [(8, 4, 3, 2, 1), (3, 2, 1), (8, 4, 2), (4, 2)])
def test_the_average_with_scales_is_met_to_one_channel(average: float, bits) -> None:
    model = tiny("qwen3_moe", **BIG)
    method = CameraQ(quantiser=RTN(group=32), bits=bits)
    layer = model.layers[0]
    costs, numbers = method.costs(layer), 3 * 64 * 32 * 8
    if not costs[bits[-1]] <= average * 192 <= costs[bits[0]]:
        with pytest.raises(OutOfReach, match="allowed: "):
            method.check(model.layers, Bits(average), Uniform())
        return
    plan = plan_of(model, method, Bits(average))
    stored = plan.stored_bits(model.layers[:1], 16)
    assert average * numbers - max(costs.values()) < stored <= average * numbers
    assert plan.lineage["achieved"] == pytest.approx(1 - stored / (16 * numbers), abs=0.002)
    assert f"{stored / numbers:.6g} bits a number" in plan.lineage["notes"][0]


def test_classes_fall_with_energy_and_channels_without_any_come_last() -> None:
    model = tiny("qwen3_moe", **BIG)
    model.layers[0].experts.gate_up_proj[5, 7] = 0
    energy, bits = bits_of(model, CameraQ(quantiser=RTN(group=32)), 3)
    assert energy[5, 7] == 0
    assert bits[5, 7] == bits.min()
    classes = sorted(set(bits.flatten().tolist()), reverse=True)
    assert len(classes) == 3
    for more, fewer in itertools.pairwise(classes):
        assert energy[bits == more].min() >= energy[bits == fewer].max()


def test_energies_and_classes_do_not_see_how_a_channel_is_scaled() -> None:
    model, scaled = tiny("qwen3_moe", **BIG), tiny("qwen3_moe", **BIG)
    layer = scaled.layers[0]
    gate, up, down = (w.clone() for w in layer.stack())
    up[:, ::3] *= 4
    down[..., ::3] /= 4
    for name, tensor in layer.layout.pack(ExpertWeights(gate, up, down)).items():
        getattr(layer.experts, name).copy_(tensor)
    method = CameraQ(quantiser=RTN(group=32))
    (first, before), (second, after) = (bits_of(m, method, 3) for m in (model, scaled))
    torch.testing.assert_close(first, second)
    assert torch.equal(before, after)


def test_the_best_shares_are_no_worse_than_any_others_of_the_average() -> None:
    energy = torch.rand(60, dtype=torch.float64) ** 4
    costs = {3: 33, 2: 24, 1: 13}
    falling = energy.sort(descending=True).values

    def loss(counts: dict[int, int]) -> float:
        bits = bits_by_rank(energy, counts)
        return float((energy * 4.0**-bits).sum())

    for limit in (800, 1100, 1500, 1900, 1980, 5000):
        found = best_classes(energy, costs, limit)
        assert sum(found.values()) == 60
        assert sum(costs[b] * n for b, n in found.items()) <= limit
        every = [
            {3: a, 2: b, 1: 60 - a - b}
            for a in range(61)
            for b in range(61 - a)
            if 33 * a + 24 * b + 13 * (60 - a - b) <= limit
        ]
        assert loss(found) == pytest.approx(min(map(loss, every)))
    assert best_classes(energy, costs, 1980) == {3: 60, 2: 0, 1: 0}
    assert float(falling[0]) > 0
    wider = best_classes(energy, {8: 90, 4: 45, 2: 24, 1: 13}, 1500)
    assert len(wider) == 3
    with pytest.raises(OutOfReach, match="779 bits are too few for 60 channels; allowed: from 780"):
        best_classes(energy, costs, 779)


def test_shares_can_be_given() -> None:
    assert counts_by_shares(50, (8, 4, 2), (0.1, 0.3, 0.6)) == {8: 5, 4: 15, 2: 30}
    assert counts_by_shares(7, (3, 2, 1), (1 / 3, 1 / 3, 1 / 3)) == {3: 2, 2: 2, 1: 3}
    model = tiny("qwen3_moe", **BIG)
    method = CameraQ(quantiser=RTN(group=32), bits=(8, 4, 2), shares=(0.1, 0.3, 0.6))
    plan = plan_of(model, method, Bits(4.5))
    widths = channel_classes(plan.layers[0].bank)
    assert {b: sum(w) for b, w in widths.items()} == {8: 25, 4: 77, 2: 154}
    with pytest.raises(OutOfReach, match=r"cannot reach 4 bits on average.*allowed: 4\.188 to 9"):
        method.check(model.layers, Bits(4), Uniform())


def test_a_triplet_shares_its_bits_and_stays_together() -> None:
    model = tiny("qwen3_moe", **BIG)
    method = CameraQ(quantiser=RTN(group=32), bits=(16, 4))
    _, bits = bits_of(model, method, 9)
    plan = plan_of(model, method, Bits(9))
    kept, stack = bits == 16, model.layers[0].stack()
    for name, rows in (("gate", stack.gate), ("up", stack.up), ("down", stack.down.mT)):
        assert torch.equal(plan.tensors[f"layers.0.{name}.b16.dense"], rows[kept])


def test_errors_of_columns_move_on_to_those_to_come() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(160, 160, generator=generator) * 0.3 + torch.eye(160)
    h = torch.randn(600, 160, generator=generator) @ mix
    down = torch.randn(24, 160, generator=generator)
    moment = (h.mT @ h).double().unsqueeze(0)
    bits = [16] * 10 + [3] * 60 + [2] * 60 + [1] * 30
    root, _ = inverse_root(moment, 0.01)

    def made(root: torch.Tensor) -> torch.Tensor:
        coded = round_in_turn(down, root, bits, 8, torch.float32)
        return torch.cat([down[:, :10], *(dequantised(c, 8).mT for c in coded.values())], dim=1)

    plain = made(torch.eye(160))
    nearest = torch.cat(
        [down[:, :10]]
        + [
            dequantised(round_to_nearest(part.mT.contiguous(), b, 8), 8).mT
            for part, b in zip(down[:, 10:].split([60, 60, 30], dim=1), (3, 2, 1), strict=True)
        ],
        dim=1,
    )
    # one-bit scales are means, whose sums depend on how numbers lie in memory
    torch.testing.assert_close(plain, nearest, msg="without correlation it is round to nearest")
    errors = [((w - down) @ h.mT).norm() for w in (made(root[0]), nearest)]
    assert errors[0] < 0.9 * errors[1]
    one_by_one, w = torch.empty_like(down), down.clone()
    for i, b in enumerate(bits):
        column = w[:, i : i + 1].mT
        coded = column if b == 16 else dequantised(round_to_nearest(column, b, 8), 8)
        one_by_one[:, i] = coded[0]
        w[:, i:] -= torch.outer(w[:, i] - coded[0], root[0][i, i:] / root[0][i, i])
    assert ((one_by_one - made(root[0])).norm() / down.norm()) < 0.02


def test_gptq_answers_closer_than_round_to_nearest_on_the_text() -> None:
    model, text = tiny("qwen3_moe", **BIG), batches(120)
    seen, errors = Seen(model), []
    for ids, mask in text:
        model.hidden(ids, mask)
    layer = model.layers[0]
    for quantiser in (GPTQ(group=32), RTN(group=32)):
        method = CameraQ(quantiser=quantiser, bits=(4, 3, 2))
        filled = collect(tiny("qwen3_moe", **BIG), text, method.requires)
        plan = make_plan(method, model.layers, filled, Bits(4), Uniform())
        changed = apply_plan(model, plan).layers[0].experts
        gaps = [
            changed(*handed) - layer.experts.forward(*handed) for handed in seen.handed[0][:120]
        ]
        errors.append(float(torch.cat(gaps).norm()))
    assert errors[0] < 0.95 * errors[1]


def test_later_layers_are_measured_on_what_earlier_ones_have_become() -> None:
    model, method = tiny("qwen3_moe", **BIG), CameraQ(quantiser=RTN(group=32))
    driver = sequential(model, batches(), method.requires, lambda _: lambda b: b)
    plan = make_plan(method, model.layers, StatisticSet(), Bits(2.5), Uniform(), driver)
    at_once = plan_of(model, method, Bits(2.5))
    assert plan.layers[0] == at_once.layers[0]
    assert plan.layers[1] != at_once.layers[1]


def test_the_saved_file_holds_the_bits_that_were_planned(tmp_path) -> None:
    model = tiny("qwen3_moe", **BIG)
    plan = plan_of(model, CameraQ(quantiser=GPTQ(group=32)), Bits(3))
    student = apply_plan(model, plan)
    path = export_student(student, plan, tmp_path / "m", form="package", dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors").items()
    parts = ("_codes", "_scale", "_zero", "_dense")
    saved = sum(t.numel() * t.itemsize for name, t in tensors if name.endswith(parts))
    assert 8 * saved == plan.stored_bits(model.layers, 16)
    assert 8 * saved <= 3 * 2 * 3 * 64 * 32 * 8


def test_bad_settings_and_averages_are_refused() -> None:
    layers = tiny("qwen3_moe", **BIG).layers
    with pytest.raises(InputError, match=r"bits=\[2, 4\] must be falling and out of \[0, 1, 2"):
        CameraQ(quantiser=ROUND, bits=[2, 4])
    with pytest.raises(InputError, match=r"bits=\[5, 3\] must be falling"):
        CameraQ(quantiser=ROUND, bits=(5, 3))
    with pytest.raises(
        InputError, match=r"shares=\[0.5, 0.6\] must be a share of each of \[4, 2\]"
    ):
        CameraQ(quantiser=ROUND, bits=(4, 2), shares=(0.5, 0.6))
    with pytest.raises(InputError, match=r"alpha=-1 is outside"):
        CameraQ(quantiser=ROUND, alpha=-1)
    method = CameraQ(quantiser=RTN(group=64), bits=(3, 2, 1))
    with pytest.raises(OutOfReach, match=r"cannot reach 4 bits .*allowed: 1\.25 to 3\.5"):
        method.check(layers, Bits(4), Uniform())
    with pytest.raises(OutOfReach, match="CameraQ is swept by bits, not by ratio"):
        method.check(layers, Ratio(0.5), Uniform())
