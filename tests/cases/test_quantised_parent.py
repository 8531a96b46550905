"""A parent in another number format becomes plain floats, or is refused before weights load."""

import pytest
import torch
from parents import cell_of, edit, parent, pruned
from safetensors.torch import load_file, save_file

from rerail import api
from rerail.errors import InputError
from rerail.export.reload import check_reload
from rerail.export.targets import as_written
from rerail.moe.source import ModelSource

DEEPSEEK = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}
REFUSED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "group_size": 128},
    "nvfp4": {"quant_method": "nvfp4"},
    "mxfp4": {"quant_method": "mxfp4"},
    "brand-new": {"quant_method": "brand-new"},
    "unnamed": {"bits": 3},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return parent(tmp_path_factory.mktemp("plain") / "model")


def weights(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, tensors) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def linked(plain, folder):
    """A folder of its own over the same weights."""
    folder.mkdir()
    for path in plain.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("method", REFUSED)
def test_a_format_that_does_not_become_plain_is_refused_without_weights(plain, tmp_path, method):
    folder = linked(plain, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    edit(folder, quantization_config=REFUSED[method])
    with pytest.raises(InputError, match=f"as plain floats: its config names .*'{method}'") as why:
        cell_of(folder).check()
    assert "\n" not in str(why.value)
    with pytest.raises(InputError, match=method):
        api.load(str(folder))


@pytest.mark.parametrize("name", ["compression_config", "quantization"])
def test_other_names_of_the_entry_are_seen(plain, tmp_path, name):
    folder = linked(plain, tmp_path / "model")
    edit(folder, **{name: {"bits": 4, "group_size": 64}})
    with pytest.raises(InputError, match="number format 'unnamed'"):
        ModelSource(str(folder)).meta()


def test_a_file_of_modelopt_is_seen(plain, tmp_path):
    folder = linked(plain, tmp_path / "model")
    edit(folder, "hf_quant_config.json", quantization={"quant_algo": "NVFP4"})
    with pytest.raises(InputError, match=r"hf_quant_config.json beside its weights"):
        ModelSource(str(folder)).meta()


def test_an_attention_whose_package_is_not_there_is_a_sentence(plain, tmp_path):
    folder = linked(plain, tmp_path / "model")
    edit(folder, _attn_implementation="flash_attention_2")
    with pytest.raises(InputError, match=r"model .*FlashAttention2"):
        cell_of(folder).check()


def test_packed_tensors_without_a_word_in_the_config_are_refused(plain, tmp_path):
    folder = linked(plain, tmp_path / "model")
    tensors = weights(folder)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    rewrite(folder, tensors)
    with pytest.raises(InputError, match=f"holds {name} in F8_E4M3, which is packed"):
        ModelSource(str(folder)).meta()


def test_a_stale_entry_over_plain_floats_is_refused(plain, tmp_path):
    folder = linked(plain, tmp_path / "model")
    edit(folder, quantization_config=FP8)
    with pytest.raises(
        InputError, match=r"holds plain floats, .*'fp8'; remove quantization_config"
    ):
        ModelSource(str(folder)).meta()


def unpacked_fp8(tensors, block):
    """Return tensors in 8 bits with scales of equal blocks, and what they stand for."""
    packed, meant = {}, {}
    for name, tensor in tensors.items():
        meant[name] = packed[name] = tensor
        if tensor.dim() != 2 or "proj" not in name:
            continue
        blocks = tensor.float().unflatten(0, (-1, block)).unflatten(2, (-1, block))
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        wide = scales[:, None, :, None]
        small = (blocks / wide).to(torch.float8_e4m3fn)
        packed[name], packed[f"{name}_scale_inv"] = small.flatten(2).flatten(0, 1), scales
        meant[name] = (small.float() * wide).flatten(2).flatten(0, 1)
    return packed, meant


def test_fp8_weights_load_and_export_as_the_floats_they_stand_for(tmp_path):
    folder = parent(tmp_path / "fp8", "deepseek_v3", **DEEPSEEK)
    packed, meant = unpacked_fp8(weights(folder), 8)
    rewrite(folder, packed)
    edit(folder, quantization_config=FP8)
    source = ModelSource(str(folder), dtype="bfloat16", device="cpu")
    assert source.stored_dtype() == torch.bfloat16
    saved = api.save(api.compress(api.load(source), "aimer", 0), tmp_path / "saved")
    written = weights(saved)
    assert written.keys() == meant.keys()
    assert all(torch.equal(written[n], t.to(written[n].dtype)) for n, t in meant.items())
    ModelSource(str(saved)).load()


def test_fp8_blocks_that_do_not_divide_a_matrix_are_refused(tmp_path):
    folder = parent(tmp_path / "fp8", "deepseek_v3", **DEEPSEEK)
    packed, _ = unpacked_fp8(weights(folder), 8)
    rewrite(folder, packed)
    edit(folder, quantization_config={**FP8, "weight_block_size": [12, 12]})
    with pytest.raises(InputError, match=r"'fp8' with \d scales for \d+ numbers of model"):
        ModelSource(str(folder)).meta()


def test_gpt_oss_as_published_is_pruned_and_exported_as_plain_floats(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 8, "num_local_experts": 8}
    folder = parent(
        tmp_path / "mxfp4", "gpt_oss", num_experts_per_tok=2, rope_parameters=rope, **sizes
    )
    generator = torch.Generator().manual_seed(1)
    packed, meant = {}, {}
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    steps = torch.cat([steps, -steps])
    for name, tensor in weights(folder).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = meant[name] = tensor
            continue
        experts, inner, outer = tensor.shape
        shape = (experts, outer, inner // 32)
        codes = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 126, shape, generator=generator, dtype=torch.uint8)
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = codes, scales
        pairs = torch.stack([steps[(codes & 15).long()], steps[(codes >> 4).long()]], dim=-1)
        numbers = pairs.flatten(-2) * torch.exp2(scales.float() - 127)[..., None]
        meant[name] = numbers.flatten(-2).transpose(1, 2)
    rewrite(folder, packed)
    edit(folder, quantization_config={"quant_method": "mxfp4"})
    teacher, student, ids = pruned(folder)
    for name, parameter in teacher.model.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, meant[name].float()), name
    saved = api.save(student, tmp_path / "saved")
    assert check_reload(saved, ids[:2], as_written(student.model, torch.bfloat16)) == 0
    assert {t.dtype for t in weights(saved).values()} == {torch.bfloat16}
