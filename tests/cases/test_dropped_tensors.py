"""What a parent holds and an export does not is named, and the written config does not claim it."""

import json
import logging

import pytest
import torch
from parents import edit, parent
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from checkpoints import add_tokenizer
from rerail import api
from rerail.errors import InputError
from rerail.export.checkpoint import read_manifest

ERNIE = {
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
}
TEXT = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
SIGHT = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
}


def with_mtp(folder):
    parent(folder, "ernie4_5_moe", **ERNIE)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    extra = {n: t.clone() for n, t in tensors.items() if ".layers.1." in n}
    tensors |= {n.replace("layers.1.", "mtp_block.0."): t for n, t in extra.items()}
    tensors["model.mtp_linear_proj.0.weight"] = torch.ones(32, 64).bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    edit(folder, num_nextn_predict_layers=1)
    return folder


def with_sight(folder):
    torch.manual_seed(0)
    config = CONFIG_MAPPING["qwen3_5_moe"](text_config=TEXT, vision_config=SIGHT)
    made = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.mark.parametrize(("make", "part"), [(with_mtp, "mtp_"), (with_sight, "visual")])
@pytest.mark.parametrize("form", ["native", "package"])
def test_left_out_tensors_are_named_at_load_and_in_the_manifest(tmp_path, caplog, make, part, form):
    folder = make(tmp_path / "parent")
    count = sum(part in name for name in load_file(folder / "model.safetensors"))
    with caplog.at_level(logging.WARNING, logger="rerail"):
        teacher = api.load(str(folder))
    assert f"has {count} tensors that its class" in caplog.text
    student = api.compress(teacher, "aimer", 0.5)
    saved = api.save(student, tmp_path / "saved", form)
    left_out = read_manifest(saved)["left_out"]
    assert left_out["tensors"] == sum(left_out["parts"].values()) == count
    assert all(part in name for name in left_out["parts"])
    config = json.loads((saved / "config.json").read_text())
    assert not config.get("num_nextn_predict_layers")
    assert "vision_config" not in config
    again = api.load(str(saved))
    ids = torch.arange(16)[None]
    with torch.no_grad():
        logits = [m.model.model(ids).logits for m in (student, again)]
    torch.testing.assert_close(*logits)


def test_a_whole_parent_is_loaded_without_a_word(tmp_path, caplog):
    folder = parent(tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="rerail"):
        student = api.compress(api.load(str(folder)), "aimer", 0.5)
    assert not caplog.text
    assert "left_out" not in read_manifest(api.save(student, tmp_path / "saved"))


def test_weights_without_their_scales_are_refused(tmp_path):
    folder = parent(tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.o_proj.input_scale"] = torch.ones(1)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"without its scales, model.layers.0.self_attn.o_proj"):
        api.load(str(folder))
