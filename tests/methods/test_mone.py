import pytest
import torch

from families import tiny, tokens
from rerail.compress.base import extended, make_plan
from rerail.methods.mone import MoNE
from rerail.moe.model import MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.plan import Plan
from rerail.statistics.collect import Batch, collect
from rerail.statistics.statistic import StatisticSet

ALL = [MoNE(), MoNE(freq_mode="mean"), MoNE(novice="gate2_mean"), MoNE(novice="zero")]


def batches() -> list[Batch]:
    ids = tokens(6, 24)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[4:, 15:] = False
    return list(zip(ids.split(2), mask.split(2), strict=True))


def filled(model: MoEModel) -> StatisticSet:
    return collect(model, batches(), [s for method in ALL for s in method.requires])


def outputs(model: MoEModel, layer: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each expert's outputs (c, H) and gate weights (c,) on its routed valid tokens."""
    handed, found = [], []
    view = model.layers[layer]
    hook = view.experts.register_forward_pre_hook(lambda _, args: handed.append(args))
    with torch.no_grad():
        for ids, mask in batches():
            model.hidden(ids, mask)
            handed[-1] = tuple(x[mask.flatten()] for x in handed[-1])
    hook.remove()
    hidden, index, weights = (torch.cat(parts) for parts in zip(*handed, strict=True))
    for e in range(8):
        where, which = (index == e).nonzero(as_tuple=True)
        if len(where) == 0:
            found.append((torch.zeros(0, 16, dtype=torch.float64), torch.zeros(0)))
            continue
        with torch.no_grad():
            out = view.experts(
                hidden[where], torch.full((len(where), 1), e), torch.ones(len(where), 1)
            )
        found.append((out.double(), weights[where, which].double()))
    return found


def rank(method: MoNE, model: MoEModel, layer: int = 0) -> torch.Tensor:
    view = model.layers[layer]
    return method.compared(view, filled(model).of(view, method.requires))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_the_score_is_the_spread_of_outputs_times_usage(family, mode):
    model = tiny(family)
    expected = []
    for out, gate in outputs(model):
        spread = out.std(dim=0).norm() if len(out) > 1 else torch.tensor(0.0)
        used = gate.sum() if mode == "sum" else gate.sum() / max(1, len(gate))
        expected.append(float(spread * used))
    found = rank(MoNE(freq_mode=mode), model)
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_novices_are_the_means_of_routed_outputs_and_zero_for_the_unused():
    model = tiny("deepseek_v3", n_group=1)
    model.layers[0].router.e_score_correction_bias[5] = -100
    stats, view = filled(model), model.layers[0]
    held = outputs(model)
    plain, gated, zero = (m.constants(stats.of(view, m.requires)) for m in (ALL[0], ALL[2], ALL[3]))
    for e, (out, gate) in enumerate(held):
        mean = out.mean(dim=0) if len(out) else torch.zeros(16, dtype=torch.float64)
        torch.testing.assert_close(plain[e], mean, atol=1e-6, rtol=1e-5)
        if len(out):
            weight = gate.square().unsqueeze(1)
            best = (weight * out).sum(dim=0) / weight.sum()
            torch.testing.assert_close(gated[e], best, atol=1e-6, rtol=1e-5)
    assert len(held[5][0]) == 0
    assert plain[5].count_nonzero() == gated[5].count_nonzero() == zero.count_nonzero() == 0


def test_the_gated_mean_errs_less_where_gates_count():
    model = tiny("qwen3_moe")
    stats, view = filled(model), model.layers[0]
    plain, gated = (m.constants(stats.of(view, m.requires)) for m in (ALL[0], ALL[2]))
    total = [0.0, 0.0]
    for e, (out, gate) in enumerate(outputs(model)):
        for i, novice in enumerate((gated[e], plain[e])):
            total[i] += float(((gate.unsqueeze(1) * (out - novice)) ** 2).sum())
    assert total[0] < 0.9999 * total[1]


def test_an_expert_of_constant_output_goes_first_at_no_loss():
    model = tiny("gpt_oss")
    for layer in model.layers:
        layer.experts.down_proj.data[3] = 0  # only its bias is left
    found, before = filled(model), model.model(tokens(2, 12)).logits
    for i, layer in enumerate(model.layers):
        assert found.tensors[i]["count"][3] > 0
        score = ALL[0].compared(layer, found.of(layer, ALL[0].requires))
        assert score[3] == 0
    kept = tuple(e for e in range(8) if e != 3)
    views = [found.of(layer, ALL[0].requires) for layer in model.layers]

    class Third(MoNE):
        def compared(self, layer, statistics):
            return torch.arange(8) != 3

    decisions = Third(novice=ALL[0].novice).decide(model.layers, views, [7, 7])
    for layer, decision in zip(model.layers, decisions, strict=True):
        bias = layer.experts.down_proj_bias[3]
        torch.testing.assert_close(decision.tensors["novices"][0], bias, atol=1e-6, rtol=1e-5)
        assert decision.plan.bank.integers == {"kept": kept}
    after = apply_plan(model, extended(Plan(), decisions))
    torch.testing.assert_close(after.model(tokens(2, 12)).logits, before, atol=1e-5, rtol=1e-5)
    plan = make_plan(MoNE(), model.layers, found, Ratio(0.25), Uniform())
    assert all(3 not in part.bank.integers["kept"] for part in plan.layers)


def test_router_and_gate_weights_stay_as_they_were():
    model = tiny("qwen3_moe")
    student = apply_plan(
        model, make_plan(MoNE(), model.layers, filled(model), Ratio(0.5), Uniform())
    )
    seen = []
    for one in (model, student):
        hook = one.layers[0].experts.register_forward_pre_hook(lambda _, args: seen.append(args))
        with torch.no_grad():
            one.hidden(tokens(2, 12))
        hook.remove()
        assert one.layers[0].router_rows is model.layers[0].router_rows
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


def test_more_experts_than_top_k_may_go():
    model = tiny("qwen3_moe")
    plan = make_plan(MoNE(), model.layers, filled(model), Ratio(0.875), Uniform())
    assert all(len(part.bank.integers["kept"]) == 1 for part in plan.layers)
    assert torch.isfinite(apply_plan(model, plan).model(tokens(2, 12)).logits).all()
