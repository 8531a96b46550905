from typing import Any

import pytest
import torch

from families import CONFIGS, tiny, tokens
from rerail.compress.compressor import make_plan
from rerail.compress.methods.hc_smoe import HCSMoE
from rerail.errors import InputError
from rerail.moe.layer import MoEModel
from rerail.plan.apply import apply_plan
from rerail.plan.allocation import Uniform
from rerail.plan.ratio import Ratio
from rerail.stats.collect import Batch, collect
from rerail.stats.dense import OutputSum, TokenCount
from rerail.stats.routed import Count, Moment
from rerail.stats.statistic import StatisticSet

EVERYTHING = (
    Count(),
    *(Moment(a, p) for a in (0, 1, 2) for p in (0, 1, 2)),
    OutputSum(),
    TokenCount(),
)


def batches(count: int = 6, length: int = 16, size: int = 2, padded: bool = True) -> list[Batch]:
    ids = tokens(count, length)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[::2, 11:] = False
    return list(zip(ids.split(size), mask.split(size), strict=True))


class Seen:
    """What the experts of a model were handed and what the last norm gave, batch by batch."""

    def __init__(self, model: MoEModel):
        self.handed: dict[int, list[tuple[torch.Tensor, ...]]] = {
            la.index: [] for la in model.layers
        }
        self.outputs: list[torch.Tensor] = []
        for layer in model.layers:
            layer.experts.register_forward_pre_hook(
                lambda _, args, i=layer.index: self.handed[i].append(args)
            )
        model.model.base_model.register_forward_hook(
            lambda _, __, out: self.outputs.append(out.last_hidden_state)
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
    collect(model, batches(), EVERYTHING)
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
    found = collect(teacher, batches(), EVERYTHING)
    plan = make_plan(HCSMoE(), teacher.layers, found, Ratio(0.5), Uniform())
    student = apply_plan(teacher, plan)
    student.model.set_experts_implementation(implementation)
    seen = Seen(student)
    collect(student, batches(), EVERYTHING)
    watched, seen.outputs = seen.outputs, []
    with torch.no_grad():
        for ids, mask in batches():
            student.hidden(ids, mask)
    assert all(torch.equal(a, b) for a, b in zip(watched, seen.outputs, strict=True))


@pytest.mark.parametrize("family", CONFIGS)
def test_sums_are_those_of_a_loop_over_tokens(family: str) -> None:
    found, plain = collect(tiny(family), batches(), EVERYTHING), tiny(family)
    seen = Seen(plain)
    with torch.no_grad():
        for ids, mask in batches():
            plain.hidden(ids, mask)
    for layer in plain.layers:
        expected = loop(layer, seen.handed[layer.index])
        for statistic in EVERYTHING:
            tensor = found.tensors[layer.index][statistic.name]
            torch.testing.assert_close(
                tensor.double(), expected[statistic], atol=1e-4, rtol=1e-5, msg=statistic.name
            )


def loop(layer: Any, handed: list[tuple[torch.Tensor, ...]]) -> dict[Any, torch.Tensor]:
    """Add up every statistic token by token, expert by expert."""
    expected = {s: torch.zeros(8, dtype=torch.float64) for s in EVERYTHING}
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
                    for s in EVERYTHING:
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
    model, all_batches = tiny(family), batches()
    whole = collect(model, all_batches, EVERYTHING)
    first = collect(model, all_batches[:1], EVERYTHING)
    second = collect(model, all_batches[1:], EVERYTHING)
    merged = first.merged(second, EVERYTHING)
    for index, held in whole.tensors.items():
        for name, tensor in held.items():
            torch.testing.assert_close(merged.tensors[index][name], tensor, atol=1e-9, rtol=1e-9)


def test_shuffled_batches_change_nothing() -> None:
    model, all_batches = tiny("qwen3_moe"), batches()
    forward = collect(model, all_batches, EVERYTHING)
    backward = collect(model, all_batches[::-1], EVERYTHING)
    for index, held in forward.tensors.items():
        for name, tensor in held.items():
            torch.testing.assert_close(backward.tensors[index][name], tensor, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_counts_for_nothing(family: str) -> None:
    model, ids = tiny(family), tokens(3, 10)
    plain = collect(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], EVERYTHING)
    longer = torch.cat([ids, torch.full((3, 5), 7)], dim=1)
    mask = torch.arange(15).expand(3, 15) < 10
    padded = collect(model, [(longer, mask)], EVERYTHING)
    for index, held in plain.tensors.items():
        for name, tensor in held.items():
            other = padded.tensors[index][name]
            torch.testing.assert_close(other, tensor, atol=1e-4, rtol=1e-4, msg=name)


def test_no_autograd_graph_is_held_even_where_parameters_train() -> None:
    model = tiny("qwen3_moe")
    model.model.requires_grad_(True)
    found = collect(model, batches(), EVERYTHING)
    assert not any(t.requires_grad for held in found.tensors.values() for t in held.values())


def test_sums_are_kept_wide_and_on_the_cpu() -> None:
    model = tiny("qwen3_moe")
    model.model.to(torch.bfloat16)
    found = collect(model, batches(), EVERYTHING)
    dtypes = {t.dtype for held in found.tensors.values() for t in held.values()}
    assert dtypes == {torch.int64, torch.float64}


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


def test_a_model_with_nan_weights_is_refused() -> None:
    model = tiny("qwen3_moe")
    model.layers[1].experts.down_proj.data[3] = torch.nan
    with pytest.raises(InputError, match="statistic output_sum of layer 1 is not finite"):
        collect(model, batches(), [OutputSum()])


def test_the_bar_sees_every_batch() -> None:
    passed: list[int] = []

    def bar(items: Any) -> Any:
        for item in items:
            passed.append(len(item[0]))
            yield item

    assert isinstance(collect(tiny("qwen3_moe"), batches(), [Count()], bar), StatisticSet)
    assert passed == [2, 2, 2]
