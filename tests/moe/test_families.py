"""Names that transformers gives to the parts of a model stand in one file."""

import ast
from pathlib import Path

import pytest
from transformers import AutoConfig

import rerail
from families import CONFIGS, tiny
from rerail.errors import InputError
from rerail.moe import families
from rerail.moe.families import (
    attention_of,
    check_family,
    decoder_layer,
    expert_count_aliases,
    path_in_body,
    set_expert_count,
)

SOURCE = Path(rerail.__file__).parent
# words of transformers' models and configs alone: nowhere else, in whatever place
THEIRS = {
    *("self_attn", "input_layernorm", "post_attention_layernorm", "embed_tokens", "lm_head"),
    *("base_model", "base_model_prefix", "topk_method", "num_group", "n_group", "topk_group"),
    *("n_routed_experts", "num_local_experts", "moe_num_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "output_router_logits", "attribute_map", "gate.weight", "wg.weight"),
    *("correction_bias", "e_score_correction_bias", "expert_bias", "balancing_biases"),
    *("is_transposed", "is_concatenated", "_experts_implementation", "_attn_implementation"),
    *("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_get_dtype_plan"),
}
# words that are ours too: nowhere else where a string names an attribute
SHARED = {"gate", "router", "experts", "top_k", "num_experts", "intermediate_size"}


def docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield first.value


def foreign_names(source):
    """Return the names of transformers' models that a file uses, docstrings left out."""
    tree = ast.parse(source)
    prose = set(map(id, docstrings(tree)))
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used |= {node.attr} & THEIRS
        if isinstance(node, ast.Constant) and id(node) not in prose and isinstance(node.value, str):
            used |= {node.value} & THEIRS
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            is_access = node.func.id in ("getattr", "setattr", "hasattr") and len(node.args) > 1
            if is_access and isinstance(node.args[1], ast.Constant):
                used |= {node.args[1].value} & SHARED
    return used


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE))
)
def test_a_name_of_transformers_stands_in_the_file_of_families_only(path):
    used = foreign_names(path.read_text(encoding="utf-8"))
    assert not used or path == Path(families.__file__)


def test_the_search_sees_attributes_strings_and_accesses_but_no_prose():
    assert foreign_names("layer.self_attn") == {"self_attn"}
    assert foreign_names("getattr(block, 'gate')") == {"gate"}
    assert foreign_names("names = ('n_group', 'other')") == {"n_group"}
    assert foreign_names("'''self_attn'''\nlayer.router") == set()
    text = Path(families.__file__).read_text(encoding="utf-8")
    assert foreign_names(text) >= {"self_attn", "n_group", "base_model", "top_k"}


def test_a_family_outside_the_seam_is_refused_with_its_reason():
    check_family("qwen3_moe")
    with pytest.raises(InputError, match="'dbrx' is not supported: its experts hold two-dim"):
        check_family("dbrx")


@pytest.mark.parametrize("family", CONFIGS)
def test_every_decoder_layer_is_found_from_a_block_and_has_its_attention(family):
    model = tiny(family)
    layers = model.decoder_layers()
    assert len(layers) == 2
    for layer, decoder in zip(model.layers, layers, strict=True):
        assert decoder_layer(model.model, layer.name) is decoder
        assert attention_of(decoder) in decoder.children()
        assert path_in_body(model.model, layer.name) == layer.name.removeprefix("model.")


def test_dense_decoder_layers_count_too():
    assert len(tiny("glm4_moe", first_k_dense_replace=1).decoder_layers()) == 2


def test_the_expert_count_is_written_under_every_name_that_a_config_has():
    config = AutoConfig.for_model("qwen3_moe", num_experts=8)
    set_expert_count(config, 5)
    assert config.num_experts == config.num_local_experts == 5
    assert expert_count_aliases(config, {"num_local_experts": 5, "vocab_size": 64}) == {
        "num_experts": 5
    }
    assert expert_count_aliases(config, {"vocab_size": 64}) == {}
