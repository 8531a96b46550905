import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from families import CONFIGS, tiny, tokens
from rerail.distill.trainable import master_copies
from rerail.errors import InputError
from rerail.moe.model import MoEModel
from rerail.plan.sizes import Sizes
from students import masked, merged, sliced

QWEN3_30B_A3B = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL_8X7B = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8,
    "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip


def on_meta(family: str, config: dict) -> MoEModel:
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    return MoEModel(made.requires_grad_(False))


@pytest.mark.parametrize(
    ("family", "config", "kept", "rows", "total"),
    [
        ("qwen3_moe", QWEN3_30B_A3B, 128, 12_582_912, "30.53"),
        ("qwen3_moe", QWEN3_30B_A3B, 80, 7_864_320, "19.66"),
        ("qwen3_moe", QWEN3_30B_A3B, 96, 9_437_184, "23.28"),
        ("mixtral", MIXTRAL_8X7B, 8, 1_048_576, "46.70"),
        ("mixtral", MIXTRAL_8X7B, 5, 655_360, "29.79"),
    ],
)
def test_the_published_models_have_the_published_sizes(family, config, kept, rows, total):
    model = sliced(on_meta(family, config), tuple(range(kept)))
    with master_copies(model, "router_rows") as trained:
        assert sum(p.numel() for p in trained.values()) == rows
    assert f"{Sizes.of(model, 2).total / 1e9:.2f}" == total


@pytest.mark.parametrize("family", CONFIGS)
def test_router_rows_and_nothing_else_are_trainable(family):
    student = sliced(tiny(family))
    student.model.requires_grad_(True)
    with master_copies(student, "router_rows") as trained:
        routers = [layer.rows_owner()[0] for layer in student.layers]
        trainable = [p for p in student.model.parameters() if p.requires_grad]
        assert sorted(map(id, trainable)) == sorted(map(id, trained.values()))
        own = [p for router in routers for p in router.parameters() if p.requires_grad]
        assert sorted(map(id, own)) == sorted(map(id, trainable))
        assert len(trainable) == len(student.layers) > 0
        assert {tuple(p.shape) for p in trainable} == {(student.layers[0].num_experts, 16)}
        assert not any(
            p.requires_grad for n, p in student.model.named_parameters() if "gate_up" in n
        )


def test_a_trained_bias_is_selected_on_request_and_a_buffer_is_not():
    with master_copies(sliced(tiny("gpt_oss")), "router_rows+bias") as trained:
        assert [n.removeprefix("layers.0.router.") for n in trained][:2] == ["weight", "bias"]
    with master_copies(sliced(tiny("deepseek_v3")), "router_rows+bias") as trained:
        assert {n.split(".")[-1] for n in trained} == {"weight"}


@pytest.mark.parametrize("make", [sliced, masked, merged])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_computes_with_its_masters_and_keeps_what_they_became(make, dtype):
    teacher = tiny("qwen3_moe")
    teacher.model.to(dtype)
    student = make(teacher)
    ids = tokens(2, 6)
    before, expected = student.hidden(ids), teacher.hidden(ids)
    with master_copies(student, "router_rows") as trained:
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert torch.equal(student.hidden(ids), before)
        with torch.no_grad():
            for parameter in trained.values():
                parameter.copy_(parameter.flip(0) * 3)
        moved = student.hidden(ids)
    assert not torch.equal(moved, before)
    assert torch.equal(student.hidden(ids), moved)
    assert torch.equal(teacher.hidden(ids), expected)
    for layer, master in zip(student.layers, trained.values(), strict=True):
        assert isinstance(layer.router_rows, torch.nn.Parameter)
        assert not layer.router_rows.requires_grad
        assert torch.equal(layer.router_rows, master.to(dtype))
        assert type(layer.inner_router) is type(teacher.layers[0].router)


def test_untouched_masters_come_back_bit_for_bit():
    teacher = tiny("mixtral")
    teacher.model.bfloat16()
    student = merged(teacher)
    with master_copies(student, "router_rows"):
        pass
    for mine, theirs in zip(student.layers, teacher.layers, strict=True):
        assert torch.equal(mine.router_rows, theirs.router_rows)
        assert mine.router_rows is not theirs.router_rows


def test_a_block_that_raises_leaves_the_old_parameters():
    student = sliced(tiny("olmoe"))
    old = [layer.router_rows for layer in student.layers]

    def stopped() -> None:
        with master_copies(student, "router_rows") as trained, torch.no_grad():
            next(iter(trained.values())).zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert all(layer.router_rows is rows for layer, rows in zip(student.layers, old, strict=True))
    assert float(old[0].abs().sum()) > 0


def unit_steps(parameters: list[torch.nn.Parameter]) -> None:
    """Twenty AdamW steps at the paper's learning rate, on gradients of one."""
    adam = torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.0)
    for _ in range(20):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        adam.step()


def test_every_master_moves_where_43_percent_of_bf16_weights_would_not():
    model = tiny("qwen3_moe", hidden_size=512, num_experts=128)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.layers:
            layer.router_rows.normal_(0, 0.02)
    model.model.bfloat16()
    before = [layer.router_rows.detach().clone() for layer in model.layers]
    raw = [torch.nn.Parameter(rows.clone()) for rows in before]
    unit_steps(raw)
    still = torch.cat([(a == b).flatten() for a, b in zip(raw, before, strict=True)])
    assert 0.38 < float(still.double().mean()) < 0.48
    with master_copies(model, "router_rows") as trained:
        first = [p.detach().clone() for p in trained.values()]
        unit_steps(list(trained.values()))
        assert all(bool((p != f).all()) for p, f in zip(trained.values(), first, strict=True))
    assert all(
        bool((layer.router_rows != rows).all())
        for layer, rows in zip(model.layers, before, strict=True)
    )


def test_top_1_with_renormalisation_is_refused():
    model = tiny("qwen3_moe", num_experts_per_tok=1)
    sentence = "layer 0 routes to top_k = 1 and renormalises, .* set distill=none"
    with pytest.raises(InputError, match=sentence), master_copies(model, "router_rows"):
        pytest.fail("accepted")
    assert type(model.layers[0].router.weight) is torch.nn.Parameter


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_top_1_without_renormalisation_is_accepted(family):
    model = tiny(family, num_experts_per_tok=1, norm_topk_prob=False)
    with master_copies(model, "router_rows") as trained:
        assert len(trained) == 2
