"""What a parent holds beside the model is carried over, or named and not claimed."""

import dataclasses
import functools
import json
import logging

import pytest
import torch
from parents import edit, parent
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from checkpoints import add_tokenizer
from rerail import api
from rerail.errors import InputError
from rerail.export.checkpoint import read_manifest
from rerail.export.reload import check_reload
from rerail.export.targets import as_written
from rerail.moe.left_out import LeftOut, misfits
from rerail.moe.stored_tensors import stored_tensors

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


def with_further_layer(folder, experts=True):
    """A layer beyond the model's own, which transformers reports and does not load."""
    parent(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    extra = {n: t.clone() for n, t in tensors.items() if ".layers.1." in n}
    extra = {n: t for n, t in extra.items() if experts or ".mlp." not in n}
    tensors |= {n.replace("layers.1.", "layers.2."): t for n, t in extra.items()}
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(32, 64).bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    edit(folder, num_nextn_predict_layers=1)
    return folder


def all_tensors(folder):
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def extras(folder, part):
    return {n: t for n, t in all_tensors(folder).items() if part in n}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def same_logits(first, second):
    ids = torch.arange(16)[None]
    with torch.no_grad():
        logits = [m.model.model(ids).logits for m in (first, second)]
    torch.testing.assert_close(*logits)


PARENTS = {
    "mtp": (with_mtp, "mtp_"),
    "tower": (with_sight, "visual"),
    "experts": (with_further_layer, "layers.2."),
    "dense": (lambda folder: with_further_layer(folder, experts=False), "layers.2."),
}


def check_carried(saved, folder, part):
    """Carried tensors are equal to the bit, in the one file, and named."""
    before, after = extras(folder, part), extras(saved, part)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    assert [f.name for f in saved.glob("*.safetensors*")] == ["model.safetensors"]
    facts = read_manifest(saved)
    assert facts["carried"]["tensors"] == sum(facts["carried"]["parts"].values()) == len(before)
    assert facts["carried"]["names"] == sorted(before)
    assert "left_out" not in facts


@pytest.mark.parametrize("form", ["native", "package", "remote"])
@pytest.mark.parametrize("made", PARENTS)
def test_what_has_no_place_is_named_at_load_and_carried_or_named(tmp_path, caplog, made, form):
    make, part = PARENTS[made]
    folder = make(tmp_path / "parent")
    count = len(extras(folder, part))
    with caplog.at_level(logging.WARNING, logger="rerail"):
        teacher = api.load(str(folder))
    assert f"has {count} tensors that its class" in caplog.text
    student = api.compress(teacher, "aimer", 0.5)
    saved = api.save(student, tmp_path / "saved", form)
    if made in ("mtp", "experts"):
        # stock transformers and others read 4 experts from the config, and these have 8
        left_out = read_manifest(saved)["left_out"]
        assert left_out["tensors"] == sum(left_out["parts"].values()) == count
        assert "=8, and the written config has 4" in left_out["reasons"][0]
        assert f"{count} tensors of the parent are left out of the export" in caplog.text
        assert not config_of(saved)["num_nextn_predict_layers"]
        assert not extras(saved, part)
    else:
        check_carried(saved, folder, part)
        assert config_of(saved).get("num_nextn_predict_layers") == (None if made == "tower" else 1)
    if form != "remote":
        same_logits(student, api.load(str(saved)))


def test_a_further_layer_with_experts_stays_where_their_number_does(tmp_path):
    folder = with_mtp(tmp_path / "parent")
    student = api.compress(api.load(str(folder)), "rtn", 4)
    saved = api.save(student, tmp_path / "saved", densify=True)
    check_carried(saved, folder, "mtp_")
    assert config_of(saved)["num_nextn_predict_layers"] == 1


def test_a_tower_is_read_by_the_class_that_has_a_place_for_it(tmp_path):
    folder = with_sight(tmp_path / "parent")
    student = api.compress(api.load(str(folder)), "aimer", 0.5)
    saved = api.save(student, tmp_path / "saved")
    whole, report = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(whole.float()(ids).logits, student.model.model(ids).logits)
    config = config_of(saved)
    assert config["architectures"] == ["Qwen3_5MoeForConditionalGeneration"]
    assert config["text_config"]["num_experts"] == 4
    assert config["vision_config"] == config_of(folder)["vision_config"]


def test_what_is_carried_once_is_carried_again(tmp_path):
    folder = with_sight(tmp_path / "parent")
    student = api.compress(api.load(str(folder)), "aimer", 0.5)
    saved = api.save(student, tmp_path / "saved", "package")
    again = api.save(api.load(str(saved)), tmp_path / "again", "package")
    check_carried(again, folder, "visual")
    assert "vision_config" in config_of(again)


def test_a_fresh_process_takes_what_is_carried(tmp_path):
    folder = PARENTS["dense"][0](tmp_path / "parent")
    student = api.compress(api.load(str(folder)), "aimer", 0.5)
    saved = api.save(student, tmp_path / "saved")
    written = as_written(student.model, torch.bfloat16)
    assert check_reload(saved, torch.arange(16)[None], written) < 1e-5


def test_a_parent_in_several_files_is_copied_from_each(tmp_path):
    folder = with_sight(tmp_path / "parent")
    path = folder / "model.safetensors"
    tensors, places = load_file(path), {}
    for number, name in enumerate(sorted(tensors)):
        places[name] = f"part-{number % 3}.safetensors"
    for file in set(places.values()):
        part = {n: t for n, t in tensors.items() if places[n] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    path.unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    saved = api.save(api.compress(api.load(str(folder)), "aimer", 0.5), tmp_path / "saved")
    check_carried(saved, folder, "visual")


def test_weights_in_several_files_get_files_of_what_is_carried(tmp_path, monkeypatch):
    folder = with_sight(tmp_path / "parent")
    student = api.compress(api.load(str(folder)), "aimer", 0.5)
    split = functools.partialmethod(PreTrainedModel.save_pretrained, max_shard_size="20KB")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", split)
    saved = api.save(student, tmp_path / "saved")
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    sizes = {n: t.nbytes for n, t in all_tensors(saved).items()}
    assert index["weight_map"].keys() == sizes.keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(saved / file)
        assert ("carried" in file) == ("visual" in name)
    before, after = extras(folder, "visual"), extras(saved, "visual")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    same_logits(student, api.load(str(saved)))


def test_packed_tensors_are_not_carried_into_plain_floats(tmp_path):
    folder = with_further_layer(tmp_path / "parent", experts=False)
    name = "model.layers.2.self_attn.q_proj.weight"
    packed = dataclasses.replace(stored_tensors(folder)[name], dtype="F8_E4M3")
    config = api.load(str(folder)).model.config
    reasons = misfits(LeftOut((name, "other"), {name: packed, "other": packed}), config)
    assert reasons.keys() == {name, "other"}
    assert f"{name} is packed" in reasons[name]


def test_a_whole_parent_is_loaded_without_a_word(tmp_path, caplog):
    folder = parent(tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="rerail"):
        student = api.compress(api.load(str(folder)), "aimer", 0.5)
    assert not caplog.text
    saved = api.save(student, tmp_path / "saved")
    assert not {"left_out", "carried"} & read_manifest(saved).keys()
    assert (saved / "model.safetensors").exists()


def test_weights_without_their_scales_are_refused(tmp_path):
    folder = parent(tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.o_proj.input_scale"] = torch.ones(1)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"without its scales, model.layers.0.self_attn.o_proj"):
        api.load(str(folder))
