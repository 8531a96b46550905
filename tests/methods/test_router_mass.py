import pytest
import torch

from families import CONFIGS, tiny, tokens
from rerail.compress.router_rows import masked
from rerail.methods.pmq import RouterMass
from rerail.moe.router_scores import router_scores
from rerail.plan.apply import apply_plan
from rerail.plan.plan import Plan
from rerail.statistics.collect import collect

SIGMOID = ("deepseek_v3", "glm4_moe", "afmoe", "lfm2_moe")


def test_mass_is_the_softmax_share_before_the_model_normalises_it() -> None:
    model, ids, seen = tiny("qwen3_moe"), tokens(3, 8), []
    layer = model.layers[0]
    layer.router.register_forward_hook(lambda m, a, out: seen.append((out[0], out[2])))
    valid = torch.ones_like(ids, dtype=torch.bool)
    found = collect(model, [(ids, valid)], [RouterMass()]).tensors[0][RouterMass().name]
    [(logits, index)] = seen
    share, expected = logits.softmax(-1), torch.zeros(8, dtype=torch.float64)
    for t in range(len(index)):
        for e in index[t].tolist():
            expected[e] += share[t, e].double()
    torch.testing.assert_close(found, expected)
    assert found.sum() < len(index)  # gates of this family sum to one a token


def test_mass_does_not_depend_on_batches() -> None:
    model, ids = tiny("mixtral"), tokens(4, 8)
    valid = torch.ones_like(ids, dtype=torch.bool)
    whole = collect(model, [(ids, valid)], [RouterMass()]).tensors[0]["router_mass"]
    parts = list(zip(ids.split(1), valid.split(1), strict=True))
    torch.testing.assert_close(
        collect(model, parts, [RouterMass()]).tensors[0]["router_mass"], whole
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_the_family_without_bias_or_scaling(family: str) -> None:
    layer, hidden = tiny(family).layers[0], torch.randn(20, 16)
    logits = hidden @ layer.router_rows.T
    if family == "gpt_oss":
        logits = logits + layer.router.bias
    expected = logits.sigmoid() if family in SIGMOID else logits.softmax(dim=-1)
    # two families hand their router a bias of the choice
    biases = {"lfm2_moe": "expert_bias", "afmoe": "expert_bias"}
    named = {"expert_bias": getattr(layer.block, biases[family])} if family in biases else {}
    flat = hidden.unsqueeze(0) if family == "afmoe" else hidden
    found = router_scores(layer.router, (flat,), named, 8)
    if family == "deepseek_v2":
        assert layer.num_groups == 1
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "lfm2_moe"])
def test_mass_on_a_sigmoid_router_is_of_sigmoids(family: str) -> None:
    model, ids, seen = tiny(family), tokens(3, 8), []
    layer = model.layers[0]
    layer.router.register_forward_hook(lambda m, a, out: seen.append((out[0], out[2])))
    valid = torch.ones_like(ids, dtype=torch.bool)
    found = collect(model, [(ids, valid)], [RouterMass()]).tensors[0]["router_mass"]
    logits, index = seen[0]
    score, expected = logits.sigmoid().double(), torch.zeros(8, dtype=torch.float64)
    expected.scatter_add_(0, index.flatten(), score.gather(1, index).flatten())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_masked_expert_has_no_score(family: str) -> None:
    teacher = tiny(family)
    kept = (0, 1, 2, 5, 6, 7)
    student = apply_plan(teacher, Plan((masked(teacher.layers[0], kept),)))
    hidden = torch.randn(20, 16)
    found = router_scores(student.layers[0].router, (hidden,), {}, 8)
    assert (found[:, [3, 4]] == 0).all()
    assert (found[:, list(kept)] > 0).all()
