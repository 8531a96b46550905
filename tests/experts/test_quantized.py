import pytest
import torch

from families import CONFIGS, tiny, tokens
from rerail.experts.base import BankSpec, build_bank
from rerail.experts.quantized import Coded, QuantizedExperts, dequantised, pack, unpack
from rerail.moe.fused_experts import expert_parameters
from rerail.moe.model import MoELayer
from rerail.plan.apply import apply_plan
from rerail.plan.plan import LayerPlan, Plan
from rerail.plan.sizes import Sizes

MIXED = (16, 3, 1, 2, 8, 4, 3, 16)


def spec_of(bits: tuple[int, ...] = MIXED, group: int = 6, **options: str) -> BankSpec:
    return BankSpec("quantized", len(bits), (), {"bits": bits, "group": group}, options)


def tensors_of(layer: MoELayer, spec: BankSpec) -> dict[str, torch.Tensor]:
    generator, made = torch.Generator().manual_seed(0), {}
    for name, shape in QuantizedExperts.shapes(spec, layer.dims).items():
        if name.endswith("codes"):
            made[name] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        else:
            made[name] = torch.rand(shape, generator=generator, dtype=torch.float64)
    return made


def build(layer: MoELayer, spec: BankSpec) -> QuantizedExperts:
    stocks = {layer.index: layer.stock()}
    return build_bank(spec, range(spec.stored), layer.index, stocks, tensors_of(layer, spec))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 64, 1001])
def test_codes_come_back_and_waste_less_than_a_byte(bits: int, n: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, n), generator=torch.Generator().manual_seed(n))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, -(-n * bits // 8))
    assert torch.equal(unpack(packed, bits, n).long(), codes)


def test_the_bit_stream_is_lowest_first_and_filled_with_zeros() -> None:
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == [209, 88, 31]
    assert pack(torch.tensor([1, 2, 3]), 3).tolist() == [209, 0]
    assert pack(torch.tensor([1, 0, 1]), 1).tolist() == [5]
    assert pack(torch.tensor([3, 12, 9]), 4).tolist() == [3 + 16 * 12, 9]


def test_groups_have_their_own_scale_and_zero_also_the_short_last_one() -> None:
    codes = torch.arange(10, dtype=torch.uint8).view(2, 5)
    scale, zero = torch.tensor([[1.0, 10.0], [0.5, 2.0]]), torch.tensor([[0.0, 3.0], [5.0, 1.5]])
    actual = dequantised(Coded(codes, scale, zero), 3)
    assert actual.tolist() == [[0, 1, 2, 0, 10], [0, 0.5, 1, 13, 15]]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "granitemoe"])
def test_every_expert_is_the_formula_of_its_own_width(family: str) -> None:
    layer, spec = tiny(family).layers[0], spec_of()
    bank, solved = build(layer, spec), tensors_of(layer, spec)
    for e, bits in enumerate(MIXED):
        row = [i for i, b in enumerate(MIXED) if b == bits].index(e)
        for name in ("gate", "up", "down"):
            actual, key = getattr(bank.materialise(e), name), f"{name}.b{bits}"
            assert actual.dtype == torch.float32
            if bits == 16:
                assert torch.equal(actual, solved[f"{key}.dense"][row].float())
                continue
            out, inner = actual.shape
            codes = unpack(solved[f"{key}.codes"][row], bits, out * inner).view(out, inner)
            for column in range(inner):
                scale = solved[f"{key}.scale"][row][:, column // 6]
                zero = solved[f"{key}.zero"][row][:, column // 6] if bits > 1 else 0.5
                expected = (codes[:, column] - zero) * scale
                torch.testing.assert_close(actual[:, column], expected.float())


def assert_equal(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(a, b)


@pytest.mark.parametrize("family", CONFIGS)
def test_stored_and_materialised_agree_and_codes_stay_bytes(family: str) -> None:
    layer = tiny(family).layers[0]
    kept, stored = build(layer, spec_of(run="materialised")), build(layer, spec_of())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 16, generator=generator)
    index, weights = torch.randint(0, 8, (9, 2), generator=generator), torch.rand(9, 2)
    equal = torch.testing.assert_close if layer.layout.transposed else assert_equal
    equal(kept(x, index, weights), stored(x, index, weights))
    assert kept.stored_bits(16) == stored.stored_bits(16)
    codes = {n: p for n, p in stored.named_parameters() if n.endswith("codes")}
    assert len(codes) == 3 * 5
    for bank in (stored, stored.to(torch.float64)):
        assert all(bank.get_parameter(n).dtype == torch.uint8 for n in codes)
    assert stored.dense()["down_proj"].dtype == torch.float64


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bits_are_counted_to_the_byte(family: str) -> None:
    layer = tiny(family).layers[0]
    bank, (h, i) = build(layer, spec_of()), (layer.hidden_size, layer.intermediate_size)
    kept = sum(p.numel() for n, p in bank.shell.named_parameters() if n.endswith("bias"))
    expected = 16 * kept
    for bits in MIXED:
        for out, inner in ((i, h), (i, h), (h, i)):
            numbers = {16: 0, 1: 1}.get(bits, 2) * out * -(-inner // 6)
            expected += 16 * out * inner if bits == 16 else 8 * -(-out * inner * bits // 8)
            expected += 16 * numbers
    assert sum(bank.stored_bits(16).values()) == expected
    assert bank.stored_bits(32) == QuantizedExperts.predicted_bits(
        bank.spec, layer.index, layer.dims, 32
    )


@pytest.mark.parametrize(
    ("family", "run"),
    [("qwen3_moe", "stored"), ("qwen3_moe", "materialised"), ("gpt_oss", "materialised")],
)
def test_sixteen_bits_are_the_model_itself(family: str, run: str) -> None:
    teacher, spec = tiny(family), spec_of((16,) * 8, run=run)
    parts, tensors = [], {}
    for layer in teacher.layers:
        everyone = tuple(range(8))
        parts.append(LayerPlan(layer.index, everyone, everyone, "untouched", spec))
        for name, stack in layer.stack()._asdict().items():
            tensors[f"layers.{layer.index}.{name}.b16.dense"] = stack
    plan = Plan(tuple(parts), {}, tensors)
    student = apply_plan(teacher, plan)
    with torch.no_grad():
        assert torch.equal(student.model(tokens()).logits, teacher.model(tokens()).logits)
    assert Sizes.of(student, 2) == Sizes.of(teacher, 2) == Sizes.predicted(teacher, plan, 2)


@pytest.mark.parametrize("run", ["materialised", "stored"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_gradients_reach_the_router_through_packed_experts(family: str, run: str) -> None:
    teacher = tiny(family)
    spec = spec_of(run=run)
    everyone = tuple(range(8))
    parts = [LayerPlan(i, everyone, everyone, "untouched", spec) for i in (0, 1)]
    tensors = {
        f"layers.{layer.index}.{name}": tensor
        for layer in teacher.layers
        for name, tensor in tensors_of(layer, spec).items()
    }
    student = apply_plan(teacher, Plan(tuple(parts), {}, tensors))
    rows = [layer.router_rows.requires_grad_() for layer in student.layers]
    student.model(tokens()).logits.square().mean().backward()
    for row in rows:
        assert torch.isfinite(row.grad).all()
        assert row.grad.abs().max() > 0
    trained = [n for n, p in student.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2


def test_biases_stay_the_layers_own() -> None:
    layer = tiny("gpt_oss").layers[0]
    shell = dict(build(layer, spec_of()).shell.named_parameters())
    biases = [n for n in expert_parameters(layer.experts) if n.endswith("bias")]
    assert len(biases) == 2
    assert all(shell[n] is expert_parameters(layer.experts)[n] for n in biases)
