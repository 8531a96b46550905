import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from families import tiny, tokens
from rerail.compress.base import make_plan
from rerail.experts.base import BankSpec, build_bank
from rerail.experts.basis import BasisExperts
from rerail.methods.mobe import MoBE
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.sizes import Sizes
from rerail.statistics.statistic import StatisticSet


def build(layer: MoELayer, matrices: str, **options: str) -> BasisExperts:
    options = {"matrices": matrices, "activation": "silu", **options}
    spec = BankSpec("basis", 8, (), {"bases": 2, "rank": 3}, options)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in BasisExperts.shapes(spec, layer.dims).items()
    }
    return build_bank(spec, range(8), layer.index, {layer.index: layer.stock()}, tensors)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_every_expert_is_the_formula_of_its_factors(family: str) -> None:
    layer = tiny(family).layers[0]
    bank = build(layer, "gate+up+down")
    for name in ("gate", "up", "down"):
        a, alpha, b = (bank.solved(f"{name}.{part}") for part in ("A", "alpha", "B"))
        for i in range(8):
            expected = a[i] @ F.silu(alpha[i, 0] * b[0] + alpha[i, 1] * b[1])
            actual = getattr(bank.materialise(i), name)
            torch.testing.assert_close(actual, expected.mT if name == "down" else expected)
            assert actual.dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_is_not_factorised_stays_the_layers_own(family: str) -> None:
    layer = tiny(family).layers[0]
    stock = expert_parameters(layer.experts)
    for bank in (build(layer, "gate+up"), build(layer, "gate+up", run="materialised")):
        in_shell = dict(bank.shell.named_parameters())
        assert all(in_shell[name] is p for name, p in stock.items() if name != "gate_up_proj")
        assert ("gate_up_proj" in in_shell) is bank.materialised


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("matrices", ["gate+up", "gate+up+down"])
def test_stored_and_materialised_agree(family: str, matrices: str) -> None:
    layer = tiny(family).layers[0]
    whole, bank = build(layer, matrices, run="materialised"), build(layer, matrices)
    x, index, weights = torch.randn(9, 16), torch.randint(0, 8, (9, 2)), torch.rand(9, 2)
    torch.testing.assert_close(
        bank(x, index, weights), whole(x, index, weights), atol=1e-2, rtol=1e-4
    )
    assert whole.stored() == bank.stored()
    counted = sum(p.numel() for p in bank.parameters())
    assert counted == sum(bank.stored().values())


def test_a_second_method_reads_the_experts_of_a_basis_student() -> None:
    teacher = tiny("qwen3_moe")
    first = MoBE(steps=5)
    plan = make_plan(first, teacher.layers, StatisticSet(), Ratio(0.4), Uniform())
    student = apply_plan(teacher, plan)
    again = make_plan(first, student.layers, StatisticSet(), Ratio(0.4), Uniform())
    twice = apply_plan(student, again)
    assert Sizes.predicted(student, again, 2) == Sizes.of(twice, 2) == Sizes.of(student, 2)
    assert torch.isfinite(twice.model(tokens()).logits).all()


@pytest.mark.parametrize(("bases", "billions"), [(8, 19.66), (32, 23.28)])
def test_published_sizes_of_qwen3_30b_come_out(bases: int, billions: float) -> None:
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        teacher = MoEModel(AutoModelForCausalLM.from_config(config))
    assert teacher.parameters_total() / 1e9 == pytest.approx(30.53, abs=0.005)
    method, total = MoBE(matrices="gate+up", rank="full", bases=bases), teacher.parameters_total()
    for layer in teacher.layers:
        sizes = method.sizes(layer, layer.expert_size * layer.num_experts)
        assert sizes == {"bases": bases, "rank": 768}
        predicted = BasisExperts.predicted(method.spec(layer, sizes), layer.index, layer.dims)
        total -= layer.expert_size * layer.num_experts - sum(predicted.values())
    assert total / 1e9 == pytest.approx(billions, abs=0.005)
