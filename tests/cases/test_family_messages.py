"""A family that cannot be opened is refused with its true reason."""

import pytest
from parents import edit
from transformers import AutoModelForCausalLM

from families import tiny, tiny_config
from rerail.errors import InputError
from rerail.moe import families
from rerail.moe.model import MoEModel
from rerail.moe.source import ModelSource


def test_a_family_without_a_block_for_its_experts_is_not_called_dense(monkeypatch):
    monkeypatch.setattr(families, "_ODD", {})
    config = tiny_config("gemma4_text")
    with pytest.raises(InputError, match="'gemma4_text' is not supported: it has experts, but"):
        MoEModel(AutoModelForCausalLM.from_config(config))


def test_router_rows_that_are_no_experts_are_refused():
    model = tiny("qwen3_moe").model
    model.model.layers[0].mlp.gate.weight.data = model.model.layers[0].mlp.gate.weight.data[:5]
    with pytest.raises(InputError, match="its router has 5 rows for 8 routed experts"):
        MoEModel(model)


@pytest.mark.parametrize("family", ["zaya", "dbrx", "llama4", "longcat_flash"])
def test_families_that_open_wrongly_have_a_reason(tmp_path, family):
    edit(tmp_path, model_type=family)
    with pytest.raises(InputError, match=f"model family '{family}' is not supported: "):
        ModelSource(str(tmp_path)).config()


def test_a_family_without_a_causal_model_has_a_sentence_of_ours(tmp_path):
    edit(tmp_path, model_type="t5")
    with pytest.raises(InputError, match="transformers has no causal language model of its family"):
        ModelSource(str(tmp_path)).meta()
