"""Narrower and CAMERA-P: energies, counts, and the sequential order."""

import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.sequential import sequential
from rerail.compress.templates.narrower import highest, micro_size, narrowed
from rerail.errors import InputError, OutOfReach
from rerail.experts.base import build_bank
from rerail.methods.camera import Camera
from rerail.moe.fused_experts import ExpertWeights
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.allocation import GlobalScore, PerLayer, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect
from rerail.statistics.statistic import StatisticSet
from rerail.statistics.token_sample import TokenSample

FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]
ALL_ROWS = TokenSample(1000)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = tokens(6, 12)
    return [(part, torch.ones_like(part, dtype=torch.bool)) for part in ids.split(3)]


def scores(model: MoEModel, compressor: Camera) -> list[torch.Tensor]:
    filled = collect(model, batches(), compressor.requires)
    return [compressor.score(la, filled.of(la, compressor.requires)) for la in model.layers]


def change(layer: MoELayer, hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the change of the routed output when only these channels are kept."""
    before, stock = layer.answer(hidden), layer.experts
    spec, tensors = narrowed(layer, kept)
    layer.swap(build_bank(spec, range(8), layer.index, {layer.index: stock}, tensors))
    after = layer.answer(hidden)
    layer.swap(stock)
    return after - before


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_peak_energy_is_the_squared_change_of_the_output(family: str) -> None:
    model = tiny(family)
    layer, energy = model.layers[0], scores(model, Camera(alpha=0))[0]
    hidden = ALL_ROWS.hidden(collect(model, batches(), [ALL_ROWS]).of(layer, [ALL_ROWS])[ALL_ROWS])
    seen = 0
    for e, j in [(0, 1), (3, 4), (5, 7), (7, 0)]:
        kept = torch.ones_like(energy, dtype=torch.bool)
        kept[e, j] = False
        found = change(layer, hidden, kept).square().sum()
        torch.testing.assert_close(found.double(), energy[e, j], atol=1e-7, rtol=1e-3)
        seen += bool(energy[e, j] > 1e-3)
    assert seen >= 2
    kept = highest(energy, 40)
    bound = energy[~kept].sqrt().sum()
    assert change(layer, hidden, kept).norm() <= bound * (1 + 1e-4) + 1e-6
    assert change(layer, hidden, highest(energy, 8)).norm() > 0.1


def test_the_peak_is_the_largest_single_change() -> None:
    model = tiny("qwen3_moe")
    peak, mixed = scores(model, Camera(alpha=1))[0], scores(model, Camera(alpha=0.25))[0]
    energy = scores(model, Camera(alpha=0))[0]
    torch.testing.assert_close(mixed, 0.75 * energy + 0.25 * peak)
    layer = model.layers[0]
    hidden = ALL_ROWS.hidden(collect(model, batches(), [ALL_ROWS]).of(layer, [ALL_ROWS])[ALL_ROWS])
    e, j = divmod(int(peak.argmax()), layer.intermediate_size)
    kept = torch.ones_like(peak, dtype=torch.bool)
    kept[e, j] = False
    found = change(layer, hidden, kept).square().sum(dim=1).max()
    torch.testing.assert_close(found.double(), peak[e, j], atol=1e-7, rtol=1e-3)
    assert (peak <= energy * (1 + 1e-5)).all()


def test_energy_does_not_see_how_a_channel_is_scaled_and_dead_channels_score_zero() -> None:
    model, scaled = tiny("qwen3_moe"), tiny("qwen3_moe")
    layer = scaled.layers[0]
    gate, up, down = (w.clone() for w in layer.stack())
    up[:, 2] *= 4
    down[..., 2] /= 4
    gate[1, 3] = 0
    fused = layer.layout.pack(ExpertWeights(gate, up, down))
    for name, tensor in fused.items():
        getattr(layer.experts, name).copy_(tensor)
    before, after = scores(model, Camera())[0], scores(scaled, Camera())[0]
    assert after[1, 3] == 0 < before[1, 3]
    torch.testing.assert_close(before[:, 2], after[:, 2])
    assert not highest(after, after.numel() - int((after == 0).sum()))[1, 3]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("removed", [0.1, 0.3, 0.5])
def test_the_share_of_micro_experts_is_removed(family: str, removed: float) -> None:
    model, compressor = tiny(family), Camera()
    filled = collect(model, batches(), compressor.requires)
    plan = make_plan(compressor, model.layers, filled, Ratio(removed), Uniform())
    for part, layer in zip(plan.layers, model.layers, strict=True):
        gone = 8 * layer.intermediate_size - sum(part.bank.each("widths"))
        asked = removed * layer.expert_size * 8
        if family != "gpt_oss":
            assert gone == int(removed * 8 * layer.intermediate_size)
        assert 0 <= asked - gone * micro_size(layer) < micro_size(layer)
        assert len(set(part.bank.each("widths"))) > 1


def test_the_lowest_go_first_and_ties_keep_the_lower_channel() -> None:
    score = torch.tensor([[3.0, 0.0, 2.0], [2.0, 5.0, 0.0]])
    assert highest(score, 3).tolist() == [[True, False, True], [False, True, False]]
    assert highest(torch.zeros(2, 2), 1).tolist() == [[True, False], [False, False]]


def test_allocations_that_are_known_beforehand_can_be_used() -> None:
    model, compressor = tiny("qwen3_moe"), Camera()
    filled = collect(model, batches(), compressor.requires)
    plan = make_plan(compressor, model.layers, filled, Ratio(0.5), PerLayer((3, 6)))
    assert [sum(p.bank.each("widths")) for p in plan.layers] == [3 * 8, 6 * 8]
    with pytest.raises(OutOfReach, match="allocation=uniform"):
        compressor.check(model.layers, Ratio(0.5), GlobalScore())


def test_bad_settings_and_ratios_are_refused() -> None:
    with pytest.raises(InputError, match=r"alpha=1.5 is outside \[0, 1\]"):
        Camera(alpha=1.5)
    with pytest.raises(OutOfReach, match=r"allowed ratios: 0 to 0\.946"):
        Camera().check(tiny("gpt_oss").layers, Ratio(0.99), Uniform())


def test_later_layers_are_measured_on_what_earlier_ones_have_become() -> None:
    teacher, compressor, seen = tiny("qwen3_moe"), Camera(), {}
    driver = sequential(teacher, batches(), compressor.requires, lambda _: lambda b: b)

    def watched(plan, layers):
        found = driver(plan, layers)
        assert list(found.tensors) == [layer.index for layer in layers]
        seen.update(found.tensors)
        return found

    layers, ratio = teacher.layers, Ratio(0.5)
    plan = make_plan(compressor, layers, StatisticSet(), ratio, Uniform(), watched)
    original = collect(teacher, batches(), compressor.requires).tensors
    assert torch.equal(seen[0]["middle_energy"], original[0]["middle_energy"])
    assert not torch.allclose(seen[1]["middle_energy"], original[1]["middle_energy"], rtol=1e-2)
    first = {name: t for name, t in plan.tensors.items() if name.startswith("layers.0.")}
    prefix = apply_plan(teacher, Plan(plan.layers[:1], {}, first))
    expected = collect(prefix, batches(), compressor.requires).tensors[1]["middle_energy"]
    assert torch.equal(seen[1]["middle_energy"], expected)
    one_shot = make_plan(compressor, layers, StatisticSet(original), ratio, Uniform())
    assert plan.layers[0] == one_shot.layers[0]
    assert plan.layers[1] != one_shot.layers[1]


def test_an_empty_prefix_measures_the_teacher_itself() -> None:
    teacher, compressor = tiny("qwen3_moe"), Camera()
    driver = sequential(teacher, batches(), compressor.requires, lambda _: lambda b: b)
    plan = make_plan(compressor, teacher.layers, StatisticSet(), Ratio(0), Uniform(), driver)
    found = driver(plan, teacher.layers[1:]).tensors[1]
    expected = collect(teacher, batches(), compressor.requires).tensors[1]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
