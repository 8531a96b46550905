"""MoDeGPT on experts: leverages, the refit, widths of layers, and its limits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import tiny, tokens
from measuring import batches
from rerail.compress.base import make_plan
from rerail.compress.solvers.layer_shares import softmax_shares
from rerail.compress.solvers.least_squares import damped_root
from rerail.compress.solvers.nystrom import leverages, refitted_down
from rerail.errors import InputError, OutOfReach
from rerail.export.targets import export_student
from rerail.methods.camera import Camera
from rerail.methods.mode_gpt import MoDeGPT
from rerail.moe.fused_experts import ExpertWeights
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.allocation import PerLayer, Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.block_influence import BlockInfluence
from rerail.statistics.collect import collect
from rerail.statistics.moments import MiddleMoment
from rerail.statistics.routed import Count

WIDE = {"moe_intermediate_size": 24}


def plan_of(model: MoEModel, compressor: MoDeGPT | Camera, ratio: float = 0.5) -> Plan:
    filled = collect(model, batches(), compressor.requires)
    return make_plan(compressor, model.layers, filled, Ratio(ratio), Uniform())


def activations(n: int = 200, width: int = 12, seed: int = 0) -> torch.Tensor:
    """Return correlated h (n, width)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix


def highest(score: torch.Tensor, count: int) -> torch.Tensor:
    kept = torch.zeros(len(score), dtype=torch.bool)
    kept[score.topk(count).indices] = True
    return kept


def test_leverages_are_the_ridge_s_shares_and_order_as_the_inverse_s_diagonal() -> None:
    h = activations()
    c = h.mT @ h
    level = 0.01 * float(c.diagonal().mean())
    inverse = torch.linalg.inv(c + level * torch.eye(12, dtype=torch.float64))
    found = leverages(c, 0.01)
    torch.testing.assert_close(found, (c @ inverse).diagonal(), atol=1e-10, rtol=1e-10)
    assert ((found >= 0) & (found < 1)).all()
    eigenvalues = torch.linalg.eigvalsh(c)
    assert float(found.sum()) == pytest.approx(float((eigenvalues / (eigenvalues + level)).sum()))
    assert torch.equal(found.argsort(), inverse.diagonal().argsort(descending=True))
    assert float(leverages(c, 0.1).sum()) < float(found.sum())


def test_scaling_activations_changes_no_leverage_and_no_refit() -> None:
    h = activations()
    down = torch.randn(1, 5, 12, dtype=torch.float64)
    c, kept, many = h.mT @ h, torch.arange(12) % 2 == 0, torch.tensor([200])
    torch.testing.assert_close(leverages(9 * c, 0.01), leverages(c, 0.01))
    torch.testing.assert_close(
        refitted_down(down, 9 * c[None], kept[None], many),
        refitted_down(down, c[None], kept[None], many),
    )


def test_a_refit_is_never_worse_than_the_slice_and_leaves_nothing_along_what_it_keeps() -> None:
    h = activations()
    down = torch.randn(1, 5, 12, dtype=torch.float64)
    c = h.mT @ h
    kept = highest(leverages(c, 0.01), 6)
    refit = refitted_down(down, c[None], kept[None], torch.tensor([200]))[0]
    assert not refit[:, ~kept].any()
    missing = h @ (down[0] - refit).mT
    sliced = h[:, ~kept] @ down[0][:, ~kept].mT
    assert missing.norm() < 0.9 * sliced.norm()
    assert (h[:, kept].mT @ missing).norm() < 1e-4 * (h[:, kept].mT @ sliced).norm()


def test_a_refit_to_few_tokens_trusts_them_less() -> None:
    h = activations(n=40)
    down, kept = torch.randn(1, 5, 12, dtype=torch.float64), torch.arange(12) % 2 == 0
    c, changes = (h.mT @ h)[None], []
    for tokens_seen in (23, 24):
        refit = refitted_down(down, c, kept[None], torch.tensor([tokens_seen]))
        changes.append(float((refit - down)[0][:, kept].norm()))
    assert 0 < changes[0] < 0.999 * changes[1]
    nothing = refitted_down(down, torch.zeros_like(c), kept[None], torch.tensor([0]))
    assert torch.equal(nothing, down * kept)


def test_a_channel_that_another_repeats_is_lossless_to_drop() -> None:
    h = activations()
    h[:, 7] = -2 * h[:, 3]
    kept = torch.arange(12) != 7
    down = torch.randn(1, 5, 12, dtype=torch.float64)
    refit = refitted_down(down, (h.mT @ h)[None], kept[None], torch.tensor([200]))[0]
    assert (h @ (refit - down[0]).mT).norm() < 1e-5 * (h @ down[0].mT).norm()
    pair = leverages(h.mT @ h, 1e-6)
    assert set(pair.argsort()[:2].tolist()) == {3, 7}, "what can be replaced goes first"


def test_uncorrelated_channels_are_ranked_by_energy_and_only_sliced() -> None:
    c = torch.diag(torch.rand(12, dtype=torch.float64) + 0.1)
    assert torch.equal(leverages(c, 0.01).argsort(), c.diagonal().argsort())
    kept, down = highest(c.diagonal(), 5), torch.randn(1, 5, 12, dtype=torch.float64)
    refit = refitted_down(down, c[None], kept[None], torch.tensor([50]))
    assert torch.equal(refit, down * kept)


@pytest.mark.parametrize("gate_power", [0, 2])
def test_the_refit_meets_the_normal_equations_of_its_weights(gate_power: int) -> None:
    model, method = tiny("qwen3_moe", **WIDE), MoDeGPT(gate_power=gate_power)
    filled = collect(model, batches(40), method.requires)
    plan = make_plan(method, model.layers, filled, Ratio(0.5), Uniform())
    for part, layer in zip(plan.layers, model.layers, strict=True):
        tensors = plan.of_layer(layer.index)
        counts, c = (filled.tensors[layer.index][s.name] for s in method.requires[::-1])
        assert counts.max() > 48
        width = part.bank.each("widths")[0]
        for e in (counts > 48).nonzero().flatten().tolist():
            mine = slice(e * width, (e + 1) * width)
            same = (layer.stack().gate[e][:, None] == tensors["gate"][mine]).all(dim=-1)
            kept = same.any(dim=1)
            missing = layer.stack().down[e].double() @ c[e][:, kept]
            missing -= tensors["down"][mine].mT.double() @ c[e][kept][:, kept]
            assert missing.norm() < 1e-3 * (layer.stack().down[e].double() @ c[e]).norm()


def test_without_refit_and_by_energy_it_is_camera_of_uniform_widths() -> None:
    model = tiny("qwen3_moe", **WIDE)
    mine = plan_of(model, MoDeGPT(refit=False, rank="energy", gate_power=2))
    theirs = plan_of(model, Camera(alpha=0, widths="uniform"))
    assert mine.layers == theirs.layers
    assert all(torch.equal(mine.tensors[name], t) for name, t in theirs.tensors.items())
    ragged = plan_of(model, Camera(alpha=0))
    assert len(set(ragged.layers[0].bank.each("widths"))) > 1


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("removed", [0.1, 0.3, 0.5, 0.8])
def test_every_expert_has_the_width_that_the_ratio_leaves(family: str, removed: float) -> None:
    model = tiny(family)
    plan = plan_of(model, MoDeGPT(), removed)
    for part, layer in zip(plan.layers, model.layers, strict=True):
        [width] = set(part.bank.each("widths"))
        if family != "gpt_oss":
            assert width == int((1 - removed) * layer.intermediate_size)
    assert removed <= plan.lineage["achieved"] < removed + 1 / 8 + 0.03


def test_experts_of_one_width_export_as_a_stock_model_of_smaller_experts(tmp_path) -> None:
    model = tiny("qwen3_moe", moe_intermediate_size=32)
    plan = plan_of(model, MoDeGPT())
    student = apply_plan(model, plan)
    path = export_student(student, plan, tmp_path / "model", form="native")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert type(loaded) is type(model.model)
    assert loaded.config.moe_intermediate_size == 16
    assert loaded.model.layers[0].mlp.experts.down_proj.shape == (8, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, student.model(tokens()).logits)


def test_an_expert_without_tokens_keeps_its_largest_channels_as_they_are() -> None:
    model = tiny("qwen3_moe", **WIDE)
    layer, method = model.layers[0], MoDeGPT()
    filled = collect(model, batches(), method.requires)
    moment, count = (filled.tensors[0][s.name] for s in (MiddleMoment(), Count()))
    moment[3], count[3] = 0, 0
    view = filled.of(layer, method.requires)
    score = method.score(layer, view)
    assert torch.isfinite(score).all()
    gate, up, down = (w.double() for w in layer.expert(3))
    sizes = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    assert torch.equal(score[3].argsort(), sizes.argsort())
    assert score[3].max() < 0 <= score[moment.flatten(1).any(dim=1)].min()
    plan = method.decide_layer(layer, view, 8 * 12)
    kept = highest(sizes, 12)
    torch.testing.assert_close(plan.tensors["down"][36:48], layer.stack().down[3].mT[kept])


def test_permuted_experts_give_the_permuted_plan() -> None:
    model, turned = tiny("qwen3_moe", **WIDE), tiny("qwen3_moe", **WIDE)
    order = torch.tensor([3, 1, 4, 0, 7, 2, 6, 5])
    for layer in turned.layers:
        packed = layer.layout.pack(ExpertWeights(*(w[order] for w in layer.stack())))
        for name, tensor in packed.items():
            getattr(layer.experts, name).copy_(tensor)
        layer.router_rows.copy_(layer.router_rows[order])
    first, second = (plan_of(m, MoDeGPT()).tensors["layers.0.gate"] for m in (model, turned))
    assert torch.equal(first.view(8, 12, -1)[order], second.view(8, 12, -1))


def test_shares_by_influence_meet_their_mean_and_cap() -> None:
    s = torch.tensor([0.30, 0.05, 0.02, 0.021])
    for removed in (0.1, 0.5, 0.7, 0.8):
        shares = softmax_shares(s, removed, 0.015, 0.8)
        assert sum(shares) == pytest.approx(4 * removed)
        assert 0 <= min(shares) <= max(shares) <= 0.8
        assert shares[2] >= shares[3] >= shares[1] >= shares[0]
    expected = 4 * 0.1 * torch.softmax(-s / 0.1, dim=0)
    torch.testing.assert_close(torch.tensor(softmax_shares(s, 0.1, 0.1, 0.8)), expected)
    assert softmax_shares(s, 0.3, 1e9, 0.8) == pytest.approx([0.3] * 4, abs=1e-6)
    uneven = softmax_shares(torch.tensor([0.0, 900.0, 900.0]), 0.5, 0.015, 0.8)
    assert uneven == pytest.approx([0.8, 0.35, 0.35]), "an excess is shared out also by tiny shares"


def stream(model: MoEModel, layer: MoELayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what goes into and comes out of the decoder layer at unmasked tokens."""
    decoder, ends = model.model.model.layers[layer.index], []
    hook = decoder.register_forward_hook(lambda _, args, out: ends.append((args[0], out)))
    for ids, mask in batches():
        model.hidden(ids, mask)
        ends[-1] = tuple(end[mask] for end in ends[-1])
    hook.remove()
    return tuple(torch.cat(parts) for parts in zip(*ends, strict=True))


@pytest.mark.parametrize("layers", [None, [0]])
def test_influence_is_how_far_a_decoder_layer_turns_its_stream(layers) -> None:
    model, s = tiny("qwen3_moe"), BlockInfluence()
    before = {n: len(m._forward_hooks) for n, m in model.model.named_modules()}
    found = collect(model, batches(), [s, Count()], layers=layers).tensors
    assert {n: len(m._forward_hooks) for n, m in model.model.named_modules()} == before
    for layer in model.layers if layers is None else model.layers[:1]:
        into, out = (end.double() for end in stream(model, layer))
        cosine = torch.nn.functional.cosine_similarity(into, out, dim=-1)
        assert s.mean(found[layer.index][s.name]) == pytest.approx(float(1 - cosine.mean()))
        assert found[layer.index][s.name][1] == len(into)
        assert found[layer.index]["count"].sum() == 2 * len(into)
    halves = [
        collect(model, part, [s]).tensors[0][s.name] for part in (batches()[:1], batches()[1:])
    ]
    torch.testing.assert_close(halves[0] + halves[1], found[0][s.name])


def test_layers_that_turn_the_stream_less_lose_more() -> None:
    model, method = tiny("qwen3_moe", **WIDE), MoDeGPT(spread="influence", epsilon=0.5)
    filled = collect(model, batches(), method.requires)
    plan = make_plan(method, model.layers, filled, Ratio(0.5), Uniform())
    s = [BlockInfluence.mean(filled.tensors[i]["block_influence"]) for i in (0, 1)]
    widths = [part.bank.each("widths")[0] for part in plan.layers]
    assert (widths[0] > widths[1]) == (s[0] > s[1])
    assert widths[0] != widths[1]
    even = MoDeGPT(spread="influence", epsilon=1e9)
    assert make_plan(even, model.layers, filled, Ratio(0.5), Uniform()).layers == (
        make_plan(MoDeGPT(), model.layers, filled, Ratio(0.5), Uniform()).layers
    )


def test_bad_settings_and_ratios_are_refused() -> None:
    layers = tiny("qwen3_moe").layers
    with pytest.raises(InputError, match=r"compressor.ridge=0, epsilon=0.015: allowed: > 0"):
        MoDeGPT(ridge=0)
    with pytest.raises(OutOfReach, match=r"allowed ratios: 0 to 0\.875"):
        MoDeGPT().check(layers, Ratio(0.9), Uniform())
    MoDeGPT().check(layers, Ratio(0.875), Uniform())
    with pytest.raises(OutOfReach, match=r"cap=0.8; allowed ratios: 0 to 0.8 with allocation=un"):
        MoDeGPT(spread="influence").check(layers, Ratio(0.85), Uniform())
    with pytest.raises(OutOfReach, match=r"cannot reach 0\.5 with PerLayer"):
        MoDeGPT(spread="influence").check(layers, Ratio(0.5), PerLayer((3, 5)))


def test_a_moment_below_semidefinite_by_rounding_is_damped_until_it_has_a_root() -> None:
    c = torch.diag(torch.tensor([1.0, 1.0, -1e-5], dtype=torch.float64))
    lower, level = damped_root(c, 1e-6)
    assert level == pytest.approx(1e-4)
    torch.testing.assert_close(lower @ lower.mT, c + level * torch.eye(3, dtype=torch.float64))
