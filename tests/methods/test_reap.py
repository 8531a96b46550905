from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.compress.sequential import sequential
from rerail.methods.reap import MomentScore
from rerail.moe.model import MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.collect import Batch, collect
from rerail.statistics.statistic import StatisticSet

CONF = Path(__file__).parents[2] / "conf" / "compressor"
NAMES = ("frequency", "seer_moe", "ean", "man", "msan", "gated_ean", "gated_l2", "reap", "reap_l2")


def preset(name: str) -> MomentScore:
    made = hydra.utils.instantiate(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(made, MomentScore)
    return made


PRESETS = {name: preset(name) for name in NAMES}


def batches() -> list[Batch]:
    ids = tokens(6, 24)
    return [(ids, torch.ones_like(ids, dtype=torch.bool))]


def filled(model: MoEModel) -> StatisticSet:
    return collect(model, batches(), {s for p in PRESETS.values() for s in p.requires})


def scores(model: MoEModel, layer: int = 0) -> dict[str, torch.Tensor]:
    found = filled(model)
    view = model.layers[layer]
    return {n: p.score(view, found.of(view, p.requires)) for n, p in PRESETS.items()}


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_reap_is_the_mean_over_tokens_of_gate_times_norm(family: str) -> None:
    model, handed = tiny(family), []
    found = scores(model)["reap"]
    layer = model.layers[0]
    hook = layer.experts.register_forward_pre_hook(lambda _, args: handed.append(args))
    with torch.no_grad():
        model.hidden(batches()[0][0])
    hook.remove()
    [(hidden, index, weights)] = handed
    apart = 0.0
    for e in range(8):
        where, which = (index == e).nonzero(as_tuple=True)
        if len(where) == 0:
            assert found[e] == 0
            continue
        with torch.no_grad():
            out = layer.experts(
                hidden[where], torch.full((len(where), 1), e), torch.ones(len(where), 1)
            )
        gate, norm = weights[where, which], out.norm(dim=-1)
        assert float(found[e]) == pytest.approx(float((gate * norm).mean()), rel=1e-5)
        apart = max(apart, abs(float(found[e] - gate.mean() * norm.mean())))
    assert apart > 1e-4


def test_relatives_of_the_score_agree_with_each_other() -> None:
    model = tiny("qwen3_moe")
    found, count = scores(model), filled(model).tensors[0]["count"]
    torch.testing.assert_close(found["reap"] * count, found["gated_ean"])
    torch.testing.assert_close(found["man"] * count, found["ean"])
    torch.testing.assert_close(found["reap_l2"] * count, found["gated_l2"])
    torch.testing.assert_close(found["frequency"], count.double())
    assert float(found["seer_moe"].sum()) == pytest.approx(6 * 24, rel=1e-6)


def test_presets_have_the_powers_of_their_papers() -> None:
    powers = {n: (int(p.mean), p.gate_power, p.norm_power) for n, p in PRESETS.items()}
    assert powers == {
        "frequency": (0, 0, 0),
        "seer_moe": (0, 1, 0),
        "ean": (0, 0, 1),
        "man": (1, 0, 1),
        "msan": (1, 0, 2),
        "gated_ean": (0, 1, 1),
        "gated_l2": (0, 2, 2),
        "reap": (1, 1, 1),
        "reap_l2": (1, 2, 2),
    }
    assert preset("reap_guarded") == MomentScore(guard="super")


def test_counts_need_no_outputs() -> None:
    for name in ("frequency", "seer_moe"):
        assert not any(s.needed() for s in PRESETS[name].requires)


def test_gate_mass_of_a_scaled_router_is_the_scale_times_the_tokens() -> None:
    found = scores(tiny("deepseek_v3", routed_scaling_factor=2.5))
    assert float(found["seer_moe"].sum()) == pytest.approx(2.5 * 6 * 24, rel=1e-6)


def test_scaling_an_expert_scales_what_depends_on_its_output() -> None:
    plain, scaled = tiny("qwen3_moe"), tiny("qwen3_moe")
    scaled.layers[1].experts.down_proj.data[3] *= 4
    before, after = scores(plain, 1), scores(scaled, 1)
    powers = {name: PRESETS[name].norm_power for name in NAMES}
    assert powers["msan"] == 2
    assert powers["seer_moe"] == powers["frequency"] == 0
    assert before["frequency"][3] > 0
    for name, power in powers.items():
        factor = torch.ones(8, dtype=torch.float64)
        factor[3] = 4.0**power
        torch.testing.assert_close(after[name], before[name] * factor, atol=1e-7, rtol=1e-5)


def test_an_expert_that_was_never_routed_to_scores_zero() -> None:
    model = tiny("deepseek_v3", n_group=1)
    model.layers[0].router.e_score_correction_bias[5] = -100
    for name, found in scores(model).items():
        assert found[5] == 0, name
        assert torch.isfinite(found).all()
        assert (found >= 0).all()


def test_a_correction_bias_chooses_but_does_not_weigh() -> None:
    model = tiny("deepseek_v3", n_group=1, norm_topk_prob=False, routed_scaling_factor=1.0)
    model.layers[0].router.e_score_correction_bias[5] = 100
    found = scores(model)
    assert found["frequency"][5] == 6 * 24
    assert found["seer_moe"][5] < 6 * 24
    with torch.no_grad():
        states = []
        hook = model.layers[0].router.register_forward_pre_hook(
            lambda _, args: states.append(args[0])
        )
        model.hidden(batches()[0][0])
        hook.remove()
        row = model.layers[0].router_rows[5]
        mass = torch.sigmoid(states[0].reshape(-1, 16) @ row).double().sum()
    assert float(found["seer_moe"][5]) == pytest.approx(float(mass), rel=1e-5)


def test_sequential_reap_measures_a_layer_on_the_pruned_prefix() -> None:
    model, method = tiny("qwen3_moe"), preset("reap_sequential")
    assert method.driver == "sequential"
    remeasure = sequential(model, batches(), method.requires, lambda _: lambda items: items)
    plan = make_plan(method, model.layers, StatisticSet(), Ratio(0.5), Uniform(), remeasure)
    prefix = apply_plan(model, Plan(plan.layers[:1]))
    own, original = (
        method.score(
            m.layers[1], collect(m, batches(), method.requires).of(m.layers[1], method.requires)
        )
        for m in (prefix, model)
    )
    assert plan.layers[1].kept == tuple(sorted(own.topk(4).indices.tolist()))
    assert (own - original).abs().max() > 1e-3 * original.max()
