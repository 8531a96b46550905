"""Routers solved for by least squares: what is minimised, what is not touched, when it is kept."""

import pytest
import torch

from families import CONFIGS, tiny
from rerail.distill.repair import repair
from rerail.distill.ridge import (
    check_ridge,
    input_moments,
    router_inputs_of,
    solve,
    solved_rows,
)
from rerail.distill.settings import Ridge
from rerail.errors import InputError, OutOfReach
from rerail.evaluate.perplexity import score_blocks
from rerail.moe.router_scores import _Watch
from rerail.plan.apply import apply_plan
from rerail.plan.plan import Plan
from rerail.teacher.hidden_states import LiveTeacher, final_hidden_states
from stored_forms import aliased
from students import blocks, kept_of, masked, merged, sliced

PLAIN = Ridge(ridge=0.0)
TEXT = blocks(24, 12)  # 193 real tokens of 16 numbers in the 21 blocks that are fitted on
BATCHES = list(TEXT.first(21).batches(8))


def unchanged(teacher):
    return apply_plan(teacher, Plan())


def alias(teacher):
    return apply_plan(teacher, aliased())


def repaired(student, teacher, settings=PLAIN, text=TEXT):
    copy = student.with_shared_parameters()
    return copy, repair(copy, LiveTeacher(teacher), text, settings, {}, seed=0)


def inputs(model, layer):
    parts = [router_inputs_of(model, [layer], *batch)[layer] for batch in BATCHES]
    return torch.cat(parts).double()


def solved(student, teacher, settings, layer=1):
    sums = input_moments(student, teacher, [layer], BATCHES)[layer]
    rows = solved_rows(student.layers[layer], *sums, settings)
    return {name.rpartition(".")[2]: tensor.double() for name, tensor in rows.items()}


def problem(student, teacher, layer=1):
    """Inputs (T, H) of the student's router, its rows, and the logits (T, E) to be matched."""
    rows = student.layers[layer].router_rows.double()
    return inputs(student, layer), rows, inputs(teacher, layer) @ rows.T


@pytest.mark.parametrize("family", CONFIGS)
def test_targets_are_the_teachers_logits_of_the_kept_slots(family):
    teacher = tiny(family)
    student, kept, layer = sliced(teacher), list(kept_of(teacher)), teacher.layers[1]
    logits = []

    def watch(router, args, named, _output):
        with _Watch(layer.num_experts) as seen:
            router.forward(*args, **named)
        logits.append(seen.logits)

    hook = layer.router.register_forward_hook(watch, with_kwargs=True)
    for ids, mask in BATCHES:
        teacher.hidden(ids, mask)
        logits[-1] = logits[-1][mask.flatten()]
    hook.remove()
    owner, _ = student.layers[1].rows_owner()
    bias = getattr(owner, "bias", None)
    target = problem(student, teacher)[2] + (0 if bias is None else bias.double())
    torch.testing.assert_close(target, torch.cat(logits)[:, kept].double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_of_an_unchanged_student_no_row_moves(family):
    teacher = tiny(family)
    student, fit = repaired(unchanged(teacher), teacher, Ridge(ridge=1e-3))
    assert fit.best_step == 0
    assert fit.kl_first == fit.kl_last == 0
    for settings in (PLAIN, Ridge()):
        rows = solved(student, teacher, settings)["weight"]
        assert torch.equal(rows.float(), teacher.layers[1].router_rows)


@pytest.mark.parametrize("make", [sliced, merged, masked, alias])
def test_plain_least_squares_are_those_of_lstsq(make):
    teacher = tiny("qwen3_moe")
    student = make(teacher)
    x, rows, target = problem(student, teacher)
    selectable = list(student.layers[1].selectable_rows)
    expected = torch.linalg.lstsq(x, target).solution.T
    found = solved(student, teacher, PLAIN)["weight"]
    torch.testing.assert_close(found[selectable], expected[selectable], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[selectable], rows[selectable], atol=1e-2)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_with_a_ridge_they_are_those_of_the_longer_system_and_the_normal_equations_hold(ridge):
    teacher = tiny("olmoe")
    student = sliced(teacher)
    x, rows, target = problem(student, teacher)
    level = ridge * float(x.square().sum() / x.shape[1])
    longer = torch.cat([x, level**0.5 * torch.eye(16, dtype=x.dtype)])
    aims = torch.cat([target, level**0.5 * rows.T])
    found = solved(student, teacher, Ridge(ridge=ridge))["weight"]
    expected = torch.linalg.lstsq(longer, aims).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradient = (x @ found.T - target).T @ x + level * (found - rows)
    scale = float((target.T @ x).abs().max())
    assert float(gradient.abs().max()) < 1e-5 * scale


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("ridge", [0.0, 1e-2, 1.0, 1e3])
def test_the_error_of_the_logits_is_never_above_that_without_repair(family, ridge):
    teacher = tiny(family)
    student = sliced(teacher)
    x, rows, target = problem(student, teacher)
    found = solved(student, teacher, Ridge(ridge=ridge))["weight"]
    before, after = ((x @ w.T - target).square().sum() for w in (rows, found))
    assert float(after) < float(before)


def test_a_higher_ridge_moves_less_and_an_endless_one_nothing():
    teacher = tiny("qwen3_moe")
    student = merged(teacher)
    rows = student.layers[1].router_rows.double()
    moved = [
        float((solved(student, teacher, Ridge(ridge=r))["weight"] - rows).norm())
        for r in (0.0, 1e-2, 1.0, 1e2, 1e9)
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 0.1
    assert moved[-1] < 1e-6


def test_layers_are_solved_in_their_order_on_what_repaired_ones_leave():
    teacher = tiny("qwen3_moe", num_hidden_layers=3)
    student, after = merged(teacher), merged(teacher)
    first, second = (f"layers.{i}.router.weight" for i in (1, 2))
    in_order = solve(after, teacher, BATCHES, Ridge(ridge=1e-3))
    for layer in (1, 2):  # `after` has all layers solved, and only earlier ones count
        found = in_order[f"layers.{layer}.router.weight"].double()
        assert torch.equal(after.layers[layer].router_rows, found.float())
        x, _, _ = problem(after, teacher, layer)
        _, rows, target = problem(student, teacher, layer)
        level = 1e-3 * float(x.square().sum() / 16)
        gradient = (x @ found.T - target).T @ x + level * (found - rows)
        assert float(gradient.abs().max()) < 1e-4 * float((target.T @ x).abs().max())
    at_once = solve(student, teacher, BATCHES, Ridge(ridge=1e-3, sequential=False))
    assert torch.equal(at_once[first], in_order[first])
    assert not torch.allclose(at_once[second], in_order[second], atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_only_router_rows_change_and_correction_biases_stay(family):
    teacher = tiny(family)
    student = merged(teacher)
    theirs = {n: t.clone() for n, t in teacher.model.state_dict().items()}
    after, fit = repaired(student, teacher)
    assert all(torch.equal(t, theirs[n]) for n, t in teacher.model.state_dict().items())
    rows = {id(layer.router_rows) for layer in after.layers}
    own = dict(student.model.state_dict())
    changed = {
        n for n, t in after.model.state_dict(keep_vars=True).items() if not torch.equal(t, own[n])
    }
    allowed = [n for n, p in after.model.named_parameters() if id(p) in rows]
    # what enters the first router is what it was
    assert changed == (set(allowed[1:]) if fit.best_step else set())
    assert fit.kl_best <= fit.kl_first
    assert set(fit.before) == set(fit.after)


def test_rows_that_a_mask_silences_stay():
    teacher = tiny("qwen3_moe")
    student = masked(teacher)
    found, rows = solved(student, teacher, PLAIN)["weight"], student.layers[1].router_rows
    for slot in range(8):
        assert torch.equal(found[slot].float(), rows[slot]) == (slot not in kept_of(teacher))


def test_rows_are_kept_only_where_the_kl_of_the_other_blocks_falls():
    teacher = tiny("qwen3_moe")
    student = merged(teacher)
    after, fit = repaired(student, teacher, PLAIN)
    states = final_hidden_states(teacher, list(TEXT.batches(8)))
    for model, point in ((student, fit.curve[0]), (after, fit.curve[fit.best_step])):
        scores = score_blocks(model, list(TEXT.batches(8)), states)
        held = float(scores.kl[21:].sum() / scores.tokens[21:].sum())
        assert point["val_kl"] == pytest.approx(held, rel=1e-5)
    assert fit.best_step == int(fit.kl_last < fit.kl_first)
    # text on which the student is as it was has nothing to win
    _, still = repaired(unchanged(teacher), teacher, PLAIN)
    assert all(torch.equal(still.after[n], row) for n, row in still.before.items())


def test_rows_are_written_in_the_models_dtype():
    teacher = tiny("qwen3_moe")
    teacher.model.to(torch.bfloat16)
    after, fit = repaired(merged(teacher), teacher, Ridge())
    assert {layer.router_rows.dtype for layer in after.layers} == {torch.bfloat16}
    assert {row.dtype for row in fit.after.values()} == {torch.float32}


@pytest.mark.parametrize("trains", ["bias", "router_rows+bias"])
def test_a_bias_is_fitted_where_the_router_has_one(trains):
    teacher = tiny("gpt_oss")
    student = sliced(teacher)
    x, rows, target = problem(student, teacher)
    owner, _ = student.layers[1].rows_owner()
    found = solved(student, teacher, Ridge(ridge=0.0, trains=trains))
    missing = target - x @ found.get("weight", rows).T
    expected = owner.bias.double() + missing.mean(dim=0)
    torch.testing.assert_close(found["bias"], expected, rtol=1e-4, atol=1e-5)
    assert ("weight" in found) == (trains != "bias")
    _, fit = repaired(student, teacher, Ridge(ridge=0.0, trains=trains))
    assert set(fit.before) == {f"layers.{i}.router.{n}" for i in (0, 1) for n in found}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_bias_of_a_router_that_adds_none_is_a_sentence(family):
    layers = on_meta(family).layers
    with pytest.raises(OutOfReach, match="trains='bias' fits a bias, and the router of layer 0"):
        check_ridge(layers, Ridge(trains="bias"), 24)
    check_ridge(layers, Ridge(), 24)


def on_meta(family):
    model = tiny(family)
    model.model.to("meta")
    return model


def test_settings_and_too_little_text_are_sentences():
    with pytest.raises(InputError, match=r"distill\.ridge=-1 must be at least 0"):
        Ridge(ridge=-1)
    with pytest.raises(InputError, match=r"distill\.trains='all' is not one of router_rows"):
        Ridge(trains="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 calibration block leaves none to fit on"):
        check_ridge(tiny("qwen3_moe").layers, Ridge(), 1)
