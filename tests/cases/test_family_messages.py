"""A family that cannot be opened is refused with its true reason."""

import pytest
from parents import BASE, edit, parent
from transformers import AutoConfig, AutoModelForCausalLM

from families import tiny
from rerail.errors import InputError
from rerail.moe import families
from rerail.moe.model import MoEModel
from rerail.moe.source import ModelSource

GEMMA = {
    "head_dim": 8,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 0,
}


def test_gemma4_is_refused_for_where_its_experts_stand(tmp_path):
    folder = parent(tmp_path / "gemma", "gemma4_text", **GEMMA)
    with pytest.raises(InputError, match=r"'gemma4_text' is not supported: its experts stand"):
        ModelSource(str(folder)).load()


def test_a_family_that_is_not_in_the_table_is_not_called_dense(monkeypatch):
    monkeypatch.setattr(families, "OUTSIDE_THE_SEAM", {})
    config = AutoConfig.for_model("gemma4_text", **{**BASE, **GEMMA})
    with pytest.raises(InputError, match="'gemma4_text' is not supported: it has experts, but"):
        MoEModel(AutoModelForCausalLM.from_config(config))


def test_router_rows_that_are_no_experts_are_refused():
    model = tiny("qwen3_moe").model
    model.model.layers[0].mlp.gate.weight.data = model.model.layers[0].mlp.gate.weight.data[:5]
    with pytest.raises(InputError, match="its router has 5 rows for 8 routed experts"):
        MoEModel(model)


@pytest.mark.parametrize("family", ["zaya", "inkling_text", "dots3_note", "gemma4"])
def test_families_that_open_wrongly_have_a_reason(tmp_path, family):
    edit(tmp_path, model_type=family)
    with pytest.raises(InputError, match=f"model family '{family}' is not supported: "):
        ModelSource(str(tmp_path)).config()


def test_a_family_without_a_causal_model_has_a_sentence_of_ours(tmp_path):
    edit(tmp_path, model_type="t5")
    with pytest.raises(InputError, match="transformers has no causal language model of its family"):
        ModelSource(str(tmp_path)).meta()
