from typing import Any

import pytest
import torch

from families import CONFIGS, tiny, tokens
from measuring import Seen, batches, everything
from rerail.compress.base import make_plan
from rerail.compress.guard import MaxOutput
from rerail.errors import InputError
from rerail.methods.d2_moe import Fisher
from rerail.methods.hc_smoe import HCSMoE
from rerail.methods.moe_i2 import LossIncrease
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.statistics.collect import collect
from rerail.statistics.dense import OutputSum, TokenCount
from rerail.statistics.moments import InputMoment, MiddleMoment
from rerail.statistics.routed import Count, GatedOutput, Moment
from rerail.statistics.squares import MiddlePeak
from rerail.statistics.statistic import Statistic, StatisticSet

SUMS = (
    Count(),
    *(Moment(a, p) for a in (0, 1, 2) for p in (0, 1, 2)),
    OutputSum(),
    TokenCount(),
)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_collecting_moves_no_bit(family: str, dtype: torch.dtype, implementation: str) -> None:
    """Four experts a token: with two, the order of the sum would not show."""
    name = {"ernie4_5_moe": "moe_k", "hunyuan_v1_moe": "moe_topk"}.get(family)
    model = tiny(family, **{name or "num_experts_per_tok": 4})
    assert model.layers[0].top_k == 4
    model.model.to(dtype)
    model.model.set_experts_implementation(implementation)
    seen = Seen(model)
    experts = [layer.experts for layer in model.layers]
    collect(model, batches(), everything(family))
    watched, seen.outputs = seen.outputs, []
    with torch.no_grad():
        for ids, mask in batches():
            model.hidden(ids, mask)
    assert len(watched) == len(seen.outputs) == 3
    assert all(torch.equal(a, b) for a, b in zip(watched, seen.outputs, strict=True))
    assert all(layer.experts is e for layer, e in zip(model.layers, experts, strict=True))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_collecting_on_a_merged_student_moves_no_bit(implementation: str) -> None:
    teacher = tiny("qwen3_moe", num_experts_per_tok=4)
    found = collect(teacher, batches(), SUMS)
    plan = make_plan(HCSMoE(), teacher.layers, found, Ratio(0.5), Uniform())
    student = apply_plan(teacher, plan)
    student.model.set_experts_implementation(implementation)
    seen = Seen(student)
    collect(student, batches(), everything("qwen3_moe"))
    watched, seen.outputs = seen.outputs, []
    with torch.no_grad():
        for ids, mask in batches():
            student.hidden(ids, mask)
    assert all(torch.equal(a, b) for a, b in zip(watched, seen.outputs, strict=True))


@pytest.mark.parametrize("family", CONFIGS)
def test_sums_are_those_of_a_loop_over_tokens(family: str) -> None:
    found, plain = collect(tiny(family), batches(), SUMS), tiny(family)
    seen = Seen(plain)
    with torch.no_grad():
        for ids, mask in batches():
            plain.hidden(ids, mask)
    for layer in plain.layers:
        expected = loop(layer, seen.handed[layer.index])
        for statistic in SUMS:
            tensor = found.tensors[layer.index][statistic.name]
            torch.testing.assert_close(
                tensor.double(), expected[statistic], atol=1e-4, rtol=1e-5, msg=statistic.name
            )


def loop(layer: Any, handed: list[tuple[torch.Tensor, ...]]) -> dict[Any, torch.Tensor]:
    """Add up every statistic token by token, expert by expert."""
    expected = {s: torch.zeros(8, dtype=torch.float64) for s in SUMS}
    expected[OutputSum()] = torch.zeros(8, 16, dtype=torch.float64)
    for (hidden, index, weights), (_, mask) in zip(handed, batches(), strict=True):
        valid = mask.flatten().nonzero().flatten().tolist()
        expected[TokenCount()] += len(valid)
        for e in range(8):
            column = torch.full((len(hidden), 1), e)
            with torch.no_grad():
                outputs = layer.experts.forward(hidden, column, torch.ones(len(hidden), 1))
            expected[OutputSum()][e] += outputs[valid].double().sum(dim=0)
            for t in valid:
                for k in (index[t] == e).nonzero().flatten().tolist():
                    gate, norm = float(weights[t, k]), float(outputs[t].norm())
                    expected[Count()][e] += 1
                    for s in SUMS:
                        if isinstance(s, Moment):
                            expected[s][e] += gate**s.gate_power * norm**s.norm_power
    return expected


@pytest.mark.parametrize("family", CONFIGS)
def test_counts_add_up_to_k_times_tokens(family: str) -> None:
    model = tiny(family)
    found = collect(model, batches(), [Count(), Moment(0, 0)])
    valid = sum(int(mask.sum()) for _, mask in batches())
    for held in found.tensors.values():
        assert int(held["count"].sum()) == 2 * valid
        assert torch.equal(held["moment_g0_n0"], held["count"].double())


@pytest.mark.parametrize("family", CONFIGS)
def test_shards_merge_to_one_pass(family: str) -> None:
    model, all_batches, wanted = tiny(family), batches(), everything(family)
    whole = collect(model, all_batches, wanted)
    first = collect(model, all_batches[:1], wanted)
    second = collect(model, all_batches[1:], wanted, first=all_batches[0][0].numel())
    for merged in (first.merge(second, wanted), second.merge(first, wanted)):
        for index, held in whole.tensors.items():
            for name, tensor in held.items():
                other = merged.tensors[index][name]
                exact = 0 if name in ("count", "token_sample_20") else 1e-12
                scale = float(tensor.abs().max())
                torch.testing.assert_close(other, tensor, atol=exact * scale, rtol=exact, msg=name)


def test_shuffled_batches_change_no_sum() -> None:
    model, all_batches = tiny("qwen3_moe"), batches()
    wanted = [s for s in everything("qwen3_moe") if s.merges_by != "sample"]
    forward = collect(model, all_batches, wanted)
    backward = collect(model, all_batches[::-1], wanted)
    for index, held in forward.tensors.items():
        for name, tensor in held.items():
            torch.testing.assert_close(backward.tensors[index][name], tensor, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_counts_for_nothing(family: str) -> None:
    model, ids, wanted = tiny(family), tokens(3, 10), everything(family)
    plain = collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], wanted)
    longer = torch.cat([ids, torch.full((3, 5), 7)], dim=1)
    mask = torch.arange(15).expand(3, 15) < 10
    padded = collect(model, [(longer, mask)], wanted)
    for index, held in plain.tensors.items():
        for name, tensor in held.items():
            if name != "token_sample_20":  # which rows are kept hangs on where they stand
                other = padded.tensors[index][name]
                torch.testing.assert_close(other, tensor, atol=1e-4, rtol=1e-4, msg=name)


def test_no_autograd_graph_is_held_even_where_parameters_train() -> None:
    model = tiny("qwen3_moe")
    model.model.requires_grad_(True)
    found = collect(model, batches(), [*everything("qwen3_moe"), Fisher(), LossIncrease()])
    assert not any(t.requires_grad for held in found.tensors.values() for t in held.values())


def test_sums_are_kept_wide_and_on_the_cpu() -> None:
    model = tiny("qwen3_moe")
    model.model.to(torch.bfloat16)
    found = collect(model, batches(), everything("qwen3_moe"))
    for held in found.tensors.values():
        assert held["count"].dtype == held["token_count"].dtype == torch.int64
        assert held["token_sample_20"].dtype == torch.float32
        sums = [t for n, t in held.items() if n not in ("count", "token_count", "token_sample_20")]
        assert {t.dtype for t in sums} == {torch.float64}
        assert {t.device.type for t in held.values()} == {"cpu"}


def test_a_statistic_asked_for_twice_is_measured_once() -> None:
    found = collect(tiny("qwen3_moe"), batches(), [Count(), Count()])
    once = collect(tiny("qwen3_moe"), batches(), [Count()])
    assert torch.equal(found.tensors[0]["count"], once.tensors[0]["count"])


def test_experts_come_back_when_the_pass_fails() -> None:
    model = tiny("qwen3_moe")
    experts = [layer.experts for layer in model.layers]
    with pytest.raises(IndexError):
        collect(model, [(torch.full((1, 4), 99), torch.ones(1, 4, dtype=torch.bool))], [Count()])
    assert [layer.experts for layer in model.layers] == experts


BROKEN = [
    ("down_proj", OutputSum()),
    ("down_proj", Moment(0, 1)),
    ("down_proj", GatedOutput(2)),
    ("down_proj", MaxOutput()),
    ("gate_up_proj", MiddleMoment()),
    ("gate_up_proj", MiddlePeak()),
    ("gate_up_proj", Fisher()),
]


@pytest.mark.parametrize(("weight", "statistic"), BROKEN, ids=lambda x: getattr(x, "name", x))
def test_a_model_with_nan_weights_is_refused(weight: str, statistic: Statistic) -> None:
    model = tiny("qwen3_moe")
    getattr(model.layers[1].experts, weight).data[3] = torch.nan
    name = f"statistic {statistic.name} of layer [01] is not finite"
    with pytest.raises(InputError, match=name):
        collect(model, batches(), [statistic])


def test_inputs_that_are_not_finite_are_refused() -> None:
    """The moments look at their diagonals only."""
    model = tiny("qwen3_moe")
    model.model.base_model.layers[1].post_attention_layernorm.weight.data[5] = torch.inf
    with pytest.raises(InputError, match="statistic input_moment of layer 1 is not finite"):
        collect(model, batches(), [InputMoment()])


@pytest.mark.parametrize("family", CONFIGS)
def test_never_chosen_slots_have_zeros(family: str) -> None:
    model = tiny(family)
    for layer in model.layers:
        layer.mask_rows((0, 1, 2, 4, 5, 6))
    found = collect(model, batches(), [*everything(family), Fisher()])
    alike = {"output_sum", "token_count", "token_sample_20", "layer_moment", "pooled_middle_moment"}
    for held in found.tensors.values():
        for name, tensor in held.items():
            if name not in alike:
                assert not tensor[[3, 7]].any(), name
                assert tensor.any(), name


def test_only_the_layers_asked_for_are_measured_and_later_ones_do_not_run() -> None:
    model = tiny("qwen3_moe", num_hidden_layers=3)
    whole = collect(model, batches(), everything("qwen3_moe"))
    seen = Seen(model)
    found = collect(model, batches(), everything("qwen3_moe"), layers=[1])
    assert set(found.tensors) == {1}
    for name, tensor in found.tensors[1].items():
        assert torch.equal(tensor, whole.tensors[1][name]), name
    assert len(seen.handed[0]) == 3
    assert seen.handed[2] == []
    assert seen.outputs == []


def test_passes_of_other_kinds_measure_the_layers_asked_for_too() -> None:
    model = tiny("qwen3_moe")
    whole = collect(model, batches(), [Fisher(), LossIncrease()])
    found = collect(model, batches(), [Fisher(), LossIncrease()], layers=[1])
    assert set(found.tensors) == {1}
    for name, tensor in found.tensors[1].items():
        assert torch.equal(tensor, whole.tensors[1][name]), name


def test_hooks_are_gone_after_a_pass() -> None:
    model = tiny("qwen3_moe")
    collect(model, batches(), everything("qwen3_moe"))
    hooks = [
        *(h for m in model.model.modules() for h in m._forward_hooks),
        *(h for m in model.model.modules() for h in m._forward_pre_hooks),
    ]
    assert hooks == []


def test_the_bar_sees_every_batch() -> None:
    passed: list[int] = []

    def bar(items: Any) -> Any:
        for item in items:
            passed.append(len(item[0]))
            yield item

    assert isinstance(collect(tiny("qwen3_moe"), batches(), [Count()], bar), StatisticSet)
    assert passed == [2, 2, 2]
