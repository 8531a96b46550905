import ast
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch

import rerail.experts
from families import CONFIGS, tiny, tokens
from rerail.errors import InputError
from rerail.experts.base import BankSpec, ExpertBank, bank_class, bank_of, build_bank
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.apply import apply_plan
from rerail.plan.plan import LayerPlan, Plan

EVERYONE = tuple(range(8))
KEPT = (1, 4, 6)
PAIRS = tuple(((0, 2 * i, 0.25), (0, 2 * i + 1, 0.75)) for i in range(4))


def bank(layer: MoELayer, members: tuple[tuple[tuple[int, int, float], ...], ...], slots: tuple):
    spec = BankSpec("dense", len(members), members)
    return build_bank(spec, slots, layer.index, {layer.index: layer.stock()}, {})


def answer(experts: torch.nn.Module, slots: int = 8, top_k: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 16, generator=generator)
    index = torch.randint(0, slots, (20, top_k), generator=generator)
    weights = torch.rand(20, top_k, generator=generator)
    with torch.no_grad():
        return experts(x, index, weights)


@pytest.mark.parametrize("family", CONFIGS)
def test_chosen_experts_are_the_layers_own_tensors(family: str) -> None:
    layer = tiny(family).layers[0]
    sliced = bank(layer, tuple(((0, e, 1.0),) for e in KEPT), (0, 1, 2))
    stock = expert_parameters(layer.experts)
    for name, parameter in expert_parameters(sliced.shell).items():
        assert parameter is stock[name]
    for slot, expert in enumerate(KEPT):
        for mine, own in zip(sliced.materialise(slot), layer.expert(expert), strict=True):
            assert mine.data_ptr() == own.data_ptr()
    assert sum(sliced.stored().values()) == 3 * layer.expert_size


@pytest.mark.parametrize("family", CONFIGS)
def test_stock_experts_answer_as_the_bank_of_all_of_them_does(family: str) -> None:
    layer = tiny(family).layers[1]
    stock, made = layer.bank, bank(layer, tuple(((1, e, 1.0),) for e in EVERYONE), EVERYONE)
    assert (stock.is_stock, made.is_stock) == (True, False)
    assert stock.unwrapped() is stock.as_stock() is stock.shell is layer.experts
    assert stock.spec == made.spec
    assert stock.slots.tolist() == made.slots.tolist()
    for ask in (
        lambda b: (b.dims, b.layout, b.num_experts, b.config is layer.experts.config),
        lambda b: (b.stored(), b.stored_bits(16), b.numbers_used(1.5), b.is_fused),
        lambda b: (b.whole, b.wraps, b.watches, b.active, b.uniform, len(b.nested())),
    ):
        assert ask(stock) == ask(made)
    assert stock.stored() == stock.predicted(stock.spec, 1, stock.dims)
    pairs = zip(
        [*stock.stack(), *stock.materialise(3)], [*made.stack(), *made.materialise(3)], strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(answer(stock), answer(made))
    assert torch.equal(answer(stock), answer(layer.experts))


def test_a_view_of_stock_experts_copies_nothing_and_a_bank_is_its_own_view() -> None:
    layer = tiny("qwen3_moe").layers[0]
    own = expert_parameters(layer.experts)
    assert all(tensor is own[name] for name, tensor in layer.bank.by_slot().items())
    assert layer.stack().down.data_ptr() == own["down_proj"].data_ptr()
    layer.swap(bank(layer, PAIRS, (0, 0, 1, 1, 2, 2, 3, 3)))
    assert layer.bank is layer.experts is bank_of(layer.experts)


KINDS = sorted(
    {m.name for m in pkgutil.iter_modules(rerail.experts.__path__)} - {"base", "encoded"}
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_defines_one_bank_which_imports_torch_and_the_base_only(kind: str) -> None:
    form = bank_class(kind)
    assert issubclass(form, ExpertBank)
    assert form.__module__ == f"rerail.experts.{kind}"
    tree = ast.parse(inspect.getsource(importlib.import_module(form.__module__)))
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    ours = {name for name in modules if name.startswith("rerail")}
    assert ours <= {
        "rerail.experts.base",
        "rerail.experts.encoded",
        "rerail.experts.quantized",  # codes of few bits
        "rerail.moe.fused_experts",
        "rerail.errors",
    }
    others = {name.split(".")[0] for name in modules - ours}
    assert others <= {"torch", *sys.stdlib_module_names}


def test_nothing_asks_whether_experts_were_replaced() -> None:
    asks = re.compile(r"isinstance\([^()]*,\s*\(?\w*(?:ExpertBank|Experts|SkipPolicy)\b")
    guesses = re.compile(r"getattr\([^()]*,\s*\"(?:active|watches|uniform|wraps|slots|spec)\"")
    sources = {p: p.read_text() for p in Path(rerail.__file__).parent.rglob("*.py")}
    asking = [p.stem for p, text in sources.items() if asks.search(text) or guesses.search(text)]
    assert asking == ["base"], "only `bank_of` asks"


@pytest.mark.parametrize("family", CONFIGS)
def test_a_bank_answers_as_plain_copies_of_its_experts_do(family: str) -> None:
    layer = tiny(family).layers[0]
    for replaced in (
        bank(layer, tuple(((0, e, 1.0),) for e in KEPT), (2, 1, 1, 0, 2, 0, 1, 0)),
        bank(layer, PAIRS, (0, 0, 1, 1, 2, 2, 3, 3)),
    ):
        stock = replaced.as_stock()
        assert not isinstance(stock, ExpertBank)
        assert stock.num_experts == 8
        torch.testing.assert_close(answer(replaced), answer(stock), atol=1e-6, rtol=1e-6)


def test_a_merged_expert_is_the_weighted_sum() -> None:
    layer = tiny("gpt_oss").layers[0]
    replaced = bank(layer, PAIRS, (0, 0, 1, 1, 2, 2, 3, 3))
    stock = expert_parameters(layer.experts)
    assert set(stock) == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    for name, merged in replaced.dense().items():
        for i in range(4):
            expected = 0.25 * stock[name][2 * i] + 0.75 * stock[name][2 * i + 1]
            torch.testing.assert_close(merged[i], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_identical_experts_merge_to_themselves_to_the_bit(dtype: torch.dtype) -> None:
    layer = tiny("qwen3_moe").layers[0]
    layer.experts.to(dtype)
    for parameter in layer.experts.parameters():
        parameter.data[:] = parameter.data[:1]
    thirds = tuple((0, e, w) for e, w in enumerate([0.3, 0.3, 0.4]))
    replaced = bank(layer, (thirds,), (0,) * 8)
    for name, merged in replaced.dense().items():
        assert torch.equal(merged[0], expert_parameters(layer.experts)[name][0])


def test_two_slots_of_one_stored_expert_add_their_gate_weights() -> None:
    layer = tiny("qwen3_moe").layers[0]
    replaced, x = bank(layer, PAIRS, (0, 0, 1, 1, 2, 2, 3, 3)), torch.randn(5, 16)
    both = replaced(x, torch.tensor([[2, 3]] * 5), torch.tensor([[0.3, 0.5]] * 5))
    once = replaced(x, torch.tensor([[2]] * 5), torch.tensor([[0.8]] * 5))
    torch.testing.assert_close(both, once)


def test_a_shell_does_not_reach_the_original() -> None:
    layer = tiny("qwen3_moe").layers[0]
    stock, before = layer.experts, dict(layer.experts._parameters)
    replaced = bank(layer, PAIRS, (0, 0, 1, 1, 2, 2, 3, 3))
    replaced.shell.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
    replaced.shell.register_buffer("extra", torch.zeros(1))
    replaced.shell.add_module("inside", torch.nn.Linear(1, 1))
    assert stock._parameters.keys() == before.keys()
    assert all(stock._parameters[name] is p for name, p in before.items())
    assert not stock._buffers.keys() & {"extra"}
    assert not stock._modules.keys() & {"inside"}
    assert (stock.num_experts, replaced.shell.num_experts) == (8, 4)


def aliased(teacher: MoEModel) -> tuple[MoEModel, Plan]:
    """Return a student of one scope of two layers: layer 1 borrows three experts of layer 0."""
    pool = tuple(((0, e, 1.0),) for e in KEPT)
    own = (*pool, *(((1, e, 1.0),) for e in (0, 7)))
    plan = Plan(
        (
            LayerPlan(0, EVERYONE, (0, 0, 0, 1, 1, 1, 2, 2), "untouched", spec(pool)),
            LayerPlan(1, EVERYONE, (3, 0, 1, 2, 0, 1, 2, 4), "untouched", spec(own)),
        )
    )
    return apply_plan(teacher, plan), plan


def spec(members: tuple[tuple[tuple[int, int, float], ...], ...]) -> BankSpec:
    return BankSpec("dense", len(members), members)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_layers_of_a_scope_share_stored_experts(family: str) -> None:
    teacher, by_hand = tiny(family), tiny(family)
    student, plan = aliased(teacher)
    first, second = (expert_parameters(layer.experts) for layer in by_hand.layers)
    for name in first:
        own, borrowed = second[name].clone(), first[name][list(KEPT)].clone()
        second[name].data = torch.stack([own[0], *borrowed, *borrowed, own[7]])
        first[name].data = borrowed[[0, 0, 0, 1, 1, 1, 2, 2]]
    with torch.no_grad():
        expected, actual = by_hand.model(tokens()).logits, student.model(tokens()).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    counted = student.parameters_routed()
    assert counted == plan.stored(teacher.layers) == 5 * teacher.layers[0].expert_size


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    layer = tiny("qwen3_moe").layers[0]
    for kind in ("lowest_rank", "../dense", "os.path"):
        with pytest.raises(InputError, match=r"not known; allowed: \['basis', 'delta'"):
            build_bank(BankSpec(kind, 8), EVERYONE, 0, {0: layer.stock()}, {})
