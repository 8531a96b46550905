"""Families that keep router and experts in another way than a block with one row an expert."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from families import random_model, tiny, tiny_config, tokens
from measuring import batches
from rerail import api
from rerail.compress.base import make_plan
from rerail.config.presets import preset
from rerail.errors import InputError
from rerail.export.targets import as_written, export_student
from rerail.language_model import LanguageModel
from rerail.methods.easy_ep import Deviation
from rerail.methods.m_smoe import LogitGram
from rerail.moe.families import attention_of, decoder_layer, implementations
from rerail.moe.source import ModelSource
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.plan.sizes import Sizes
from rerail.statistics.collect import collect
from rerail.text.calibration import TokenBlocks


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma4")
    random_model(AutoModelForImageTextToText, tiny_config("gemma4")).save_pretrained(folder)
    return LanguageModel(ModelSource(str(folder)).load(), None, ModelSource(str(folder)))


def blocks():
    ids = tokens(8, 16)
    return TokenBlocks(ids, torch.ones_like(ids, dtype=torch.bool), "odd")


def test_a_block_may_be_the_decoder_layer_itself():
    model = tiny("gemma4_text")
    layer = model.layers[0]
    assert decoder_layer(model.model, layer.name) is layer.block
    assert attention_of(layer.block) is layer.block.self_attn
    assert model.decoder_layers() == [la.block for la in model.layers]
    assert (layer.num_experts, layer.top_k, layer.router_rows.shape) == (8, 2, (8, 16))


def test_one_chosen_expert_of_such_a_router_has_no_gradient():
    assert tiny("gemma4_text", top_k_experts=1).layers[0].gates_are_constant()
    assert not tiny("gemma4_text").layers[0].gates_are_constant()


@torch.no_grad()
def test_logits_of_a_router_that_returns_probabilities_are_the_products_of_its_rows():
    model = tiny("gemma4_text")
    inputs = []
    model.layers[0].router.proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    gram = collect(model, batches(padded=False), [LogitGram()]).tensors[0]["logit_gram"]
    hidden = torch.cat(inputs[::2])  # it runs a second time for its products
    logits = (hidden @ model.layers[0].router_rows.T).double()
    torch.testing.assert_close(gram, logits.T @ logits, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_the_residual_is_what_such_a_router_reads(monkeypatch):
    model = tiny("gemma4_text")
    read, given = [], []
    model.layers[0].router.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    measure = Deviation.measure
    monkeypatch.setattr(
        Deviation, "measure", lambda self, t: given.append(t.residual) or measure(self, t)
    )
    collect(model, batches(padded=False)[:1], [Deviation()])
    assert torch.equal(given[0], read[0])


@torch.no_grad()
def test_the_head_of_a_wrapper_gives_the_models_own_logits(gemma):
    ids = tokens()
    model = gemma.model
    assert model.vocab_size == 64
    torch.testing.assert_close(model.head(model.hidden(ids)), model.model(ids).logits)


def test_a_wrapper_is_pruned_in_its_text_config_and_keeps_its_towers(gemma, tmp_path):
    student = api.compress(gemma, "aimer", 0.5)
    saved = api.save(student, tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text())
    assert config["text_config"]["num_experts"] == 4
    assert "vision_config" in config
    again = ModelSource(str(saved)).load()
    with torch.no_grad():
        logits = [m.model(tokens()).logits for m in (student.model, again)]
    torch.testing.assert_close(*logits)


def test_parts_of_a_wrapper_are_loaded_each_with_its_own_attention(gemma):
    chosen = implementations(gemma.model.config)["attn_implementation"]
    assert chosen["audio_config"] == "eager"
    assert chosen["text_config"] == gemma.model.config.text_config._attn_implementation
    assert implementations(tiny("qwen3_moe").config)["attn_implementation"] == "sdpa"


def test_a_tower_may_clip_at_infinity_and_a_text_model_may_not(gemma, tmp_path):
    assert any(torch.isinf(b).any() for n, b in gemma.model.model.named_buffers() if "audio" in n)
    model = random_model(AutoModelForImageTextToText, tiny_config("gemma4"))
    model.model.language_model.norm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"holds NaN or infinity in .*language_model"):
        ModelSource(str(tmp_path)).load()


@pytest.mark.parametrize("router", ["remap", "centroid", "pooled"])
@torch.no_grad()
def test_rows_of_shared_experts_stay_whatever_becomes_of_the_others(router):
    teacher = tiny("inkling_text")
    method = preset("compressor", "hc_smoe", router=router)
    measured = collect(teacher, batches(), method.requires)
    plan = make_plan(method, teacher.layers, measured, Ratio(0.5), Uniform(), None)
    student = apply_plan(teacher, plan)
    for before, after in zip(teacher.layers, student.layers, strict=True):
        old, new = (getattr(*la.rows_owner()) for la in (before, after))
        assert len(new) == after.num_experts + 1
        assert torch.equal(new[-1], old[-1])
        assert after.num_experts == (8 if router == "remap" else 4)
        assert after.selectable_rows == tuple(range(after.num_experts))
    assert Sizes.predicted(teacher, plan, 4) == Sizes.of(student, 4)
    assert torch.isfinite(student.model(tokens()).logits).all()


@pytest.mark.parametrize("family", ["dots3_note_text", "inkling_text", "gemma4_text"])
def test_a_package_is_saved_under_names_of_ours(family, tmp_path):
    language = LanguageModel(tiny(family), None, None)
    student = api.compress(language, "hc_smoe", 0.5, blocks())
    path = export_student(student.model, student.plan, tmp_path / "model", form="package")
    again = ModelSource(str(path)).load()
    expected = as_written(student.model, form="package")
    with torch.no_grad():
        assert torch.equal(again.model(tokens()).logits, expected.model(tokens()).logits)
