import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig

from families import tiny, tokens
from rerail.errors import InputError
from rerail.moe import source as source_module
from rerail.moe.source import ModelSource

ZOO = ["tiny_coarse", "tiny_fine"]


@pytest.fixture(autouse=True)
def quiet():
    """Keep transformers' load reports off the screen."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny("qwen3_moe").model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "model")


def change(folder, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_building_a_source_loads_nothing(monkeypatch):
    monkeypatch.setattr(source_module, "AutoConfig", None)
    monkeypatch.setattr(source_module, "AutoModelForCausalLM", None)
    assert ModelSource("no/where").location == "no/where"


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_found_by_name(name):
    source = ModelSource(f"zoo:{name}")
    tokenizer = source.tokenizer()
    model = source.load()
    assert len(tokenizer) == model.vocab_size
    assert tokenizer.pad_token_id is not None
    assert model.model.dtype == torch.float32
    assert source.itemsize() == 2
    assert model.config._experts_implementation == "eager"
    assert not model.model.training
    assert not any(p.requires_grad for p in model.model.parameters())
    meta = source.meta()
    assert {p.device.type for p in meta.model.parameters()} == {"meta"}
    assert [p.shape for p in meta.model.parameters()] == [p.shape for p in model.model.parameters()]


def test_a_folder_gives_the_model_that_was_saved(saved):
    loaded, ids = ModelSource(str(saved)).load(), tokens()
    assert torch.equal(loaded.hidden(ids), tiny("qwen3_moe").hidden(ids))


def test_a_folder_in_the_home_directory_is_found(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert ModelSource("~/model").config().model_type == "qwen3_moe"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_on_a_cpu_auto_is_float32_and_other_dtypes_are_obeyed(tmp_path, dtype, expected):
    model = tiny("mixtral").model.bfloat16()
    model.save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path), dtype=dtype, device="cpu")
    assert source.load().model.dtype == expected
    assert source.itemsize() == 2


def test_the_experts_implementation_can_be_chosen(saved):
    source = ModelSource(str(saved), experts_implementation="grouped_mm")
    assert source.load().config._experts_implementation == "grouped_mm"


def nan_in_an_expert(folder):
    def edit(tensors):
        name = next(n for n in tensors if "experts.3.down_proj" in n)
        tensors[name][0, 0] = torch.nan

    change(folder, edit)


def lost_norm(folder):
    change(folder, lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"))


def lost_expert(folder):
    change(folder, lambda tensors: tensors.pop("model.layers.0.mlp.experts.2.up_proj.weight"))


def lost_experts(folder):
    def edit(tensors):
        for name in [n for n in tensors if "layers.1.mlp.experts" in n]:
            del tensors[name]

    change(folder, edit)


def other_shape(folder):
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def config(**entries):
    def spoil(folder):
        (folder / "config.json").write_text(json.dumps(entries))

    return spoil


def broken_config(folder):
    (folder / "config.json").write_text("{broken")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (nan_in_an_expert, "holds NaN or infinity in model.layers.0.mlp.experts.down_proj"),
        (lost_norm, "lacks 1 of its tensors, model.layers.1.input_layernorm.weight for one"),
        (lost_experts, "lacks 2 of its tensors, model.layers.1.mlp.experts.down_proj for one"),
        (lost_expert, "does not fit its config: tensors are lacking"),
        (other_shape, "does not fit its config: tensors are lacking"),
        (cut, "has a damaged safetensors file .*; fetch it again"),
        (no_weights, "could not be read .*no file named model.safetensors"),
        (broken_config, "could not be read .*not a valid JSON file"),
        (config(model_type="nonsense"), "model type `nonsense`"),
        (config(model_type="t5"), "no causal language model of its family"),
        (config(model_type="llama4"), "family 'llama4' is not supported: its experts are called"),
    ],
)
def test_an_unsound_checkpoint_is_refused_in_a_sentence(folder, spoil, sentence):
    spoil(folder)
    with pytest.raises(InputError, match=sentence) as caught:
        ModelSource(str(folder)).load()
    assert "\n" not in str(caught.value)


def test_a_family_outside_the_seam_is_refused_before_weights_are_looked_for(folder):
    config(model_type="llama4")(folder)
    no_weights(folder)
    for ask in ("config", "meta", "load"):
        with pytest.raises(InputError, match="family 'llama4' is not supported"):
            getattr(ModelSource(str(folder)), ask)()


def test_a_dense_model_is_refused_without_weights(folder):
    config(model_type="gpt2", n_layer=1, n_embd=8, n_head=1)(folder)
    with pytest.raises(InputError, match="'gpt2' has no MoE layers"):
        ModelSource(str(folder)).meta()


@pytest.mark.parametrize("ask", ["config", "meta", "load"])
def test_a_refused_model_says_why(ask):
    source = ModelSource("deepseek-ai/deepseek-moe-16b-base", refuse="it needs remote code")
    with pytest.raises(InputError, match="16b-base' is not supported: it needs remote code"):
        getattr(source, ask)()


def test_an_unknown_zoo_name_lists_the_zoo():
    with pytest.raises(InputError, match=r"'zoo:tiny' does not exist.* tiny_coarse, tiny_fine"):
        ModelSource("zoo:tiny").config()


@pytest.mark.parametrize("ask", ["config", "tokenizer", "load"])
def test_a_missing_folder_is_named(tmp_path, ask):
    with pytest.raises(InputError, match=r"/gone' does not exist: no .*config\.json"):
        getattr(ModelSource(str(tmp_path / "gone")), ask)()


@pytest.mark.parametrize("ask", ["config", "tokenizer", "load"])
def test_a_hub_id_without_a_network_says_so(monkeypatch, tmp_path, ask):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"'no-such/model' could not be read .* with a network"):
        getattr(ModelSource("no-such/model"), ask)()


def test_a_connection_that_breaks_is_a_sentence(monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore lines")

    monkeypatch.setattr(source_module.AutoConfig, "from_pretrained", broken)
    with pytest.raises(InputError, match=r"couldn't connect to 'https://huggingface.co'\); give"):
        ModelSource("some/model").config()


def test_other_runtime_errors_pass(monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(source_module.AutoConfig, "from_pretrained", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        ModelSource("some/model").config()


def test_a_folder_without_tokenizer_files_is_refused(saved):
    with pytest.raises(InputError, match=r"the tokenizer of model .* has 1 entries"):
        ModelSource(str(saved)).tokenizer()


def test_a_tokenizer_without_padding_pads_with_end_of_text(tmp_path):
    folder = shutil.copytree(ModelSource("zoo:tiny_fine").location, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    entries = json.loads(path.read_text())
    del entries["pad_token"]
    path.write_text(json.dumps(entries))
    tokenizer = ModelSource(str(folder)).tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


@pytest.mark.parametrize(("name", "value"), [("dtype", "float33"), ("dtype", "float64")])
def test_an_unknown_word_is_refused(name, value):
    with pytest.raises(InputError, match=f"model.{name}='{value}' is not one of auto, float32"):
        ModelSource("a/b", **{name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_refused(saved):
    with pytest.raises(InputError, match=r"model.device='cuda:1': no GPU is there"):
        ModelSource(str(saved), device="cuda:1").load()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_one_changed_byte_changes_the_fingerprint(folder, file):
    path = folder / file
    if not path.exists():
        path.write_bytes(b"{}")
    source = ModelSource(str(folder))
    before = source.fingerprint()
    assert source.fingerprint() == before
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert source.fingerprint() != before
    data[-1] ^= 1
    path.write_bytes(data)
    assert source.fingerprint() == before


def test_a_readme_does_not_change_the_fingerprint(folder):
    source = ModelSource(str(folder))
    before = source.fingerprint()
    (folder / "README.md").write_text("words")
    assert source.fingerprint() == before


def test_a_large_folder_is_known_by_size_and_time(folder, monkeypatch):
    monkeypatch.setattr(source_module, "_HASHED_WHOLE", 1)
    monkeypatch.setattr(source_module, "_hash_of", lambda *_: pytest.fail("read"))
    source, path = ModelSource(str(folder)), folder / "model.safetensors"
    before = source.fingerprint()
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert source.fingerprint() != before


def test_a_file_is_hashed_once_as_long_as_it_stays_the_same(folder, monkeypatch):
    read = []
    monkeypatch.setattr(source_module, "file_digest", lambda path: read.append(path) or "x")
    source = ModelSource(str(folder))
    source.fingerprint()
    count = len(read)
    source.fingerprint()
    assert len(read) == count > 0


def test_a_hub_model_is_known_by_its_commit(monkeypatch):
    class Config(MixtralConfig):
        _commit_hash = "abc"

    monkeypatch.setattr(source_module.AutoConfig, "from_pretrained", lambda *a, **k: Config())
    source = ModelSource("some/model")
    before = source.fingerprint()
    Config._commit_hash = "abd"
    assert source.fingerprint() != before


def test_a_device_map_places_the_model(saved):
    model = ModelSource(str(saved), device_map={"": "cpu"}).load()
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(model.hidden(ids), tiny("qwen3_moe").hidden(ids))


def test_weights_that_a_device_map_leaves_outside_the_devices_are_refused(saved):
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    with pytest.raises(InputError, match=r"offloaded|no device"):
        ModelSource(str(saved), device_map=places).load()
