"""Tiny random models of many families: 2 MoE layers, 8 experts, top 2, hidden 16, 64 words.

`CONFIGS` are those that every test runs on. Of every other MoE family of transformers a tiny model
is made by `tiny_config`, from the names of its config's entries.
"""

import dataclasses
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from rerail.moe.model import MoEModel

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_MLA = {
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_SHARED = {
    "first_k_dense_replace": 0,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "intermediate_size": 24,
}
_QWEN = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "intermediate_size": 24,
}

CONFIGS: dict[str, dict[str, object]] = {
    "qwen3_moe": {**_QWEN, "head_dim": 8, "norm_topk_prob": True, "tie_word_embeddings": True},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 8},
    "deepseek_v2": {**_SHARED, **_MLA, "topk_method": "greedy"},
    "deepseek_v3": {**_SHARED, **_MLA, "n_group": 2, "topk_group": 1},
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 8,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 8,
        "logits_scaling": 4.0,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 8,
        "intermediate_size": 24,
        "moe_layer_start_index": 0,
        "moe_num_shared_experts": 1,
    },
    "glm4_moe": {**_SHARED, "n_group": 1, "topk_group": 1, "head_dim": 8},
    "flex_olmo": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 8},
    "afmoe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "intermediate_size": 24,
        "num_dense_layers": 0,
        "num_shared_experts": 1,
        "head_dim": 8,
    },
    "hunyuan_v1_moe": {
        "num_experts": 8,
        "moe_topk": 2,
        "intermediate_size": 8,
        "head_dim": 8,
        "pad_id": 0,
    },
    "lfm2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "intermediate_size": 24,
        "num_dense_layers": 0,
        "layer_types": ["full_attention", "full_attention"],
    },
}


# families whose routers are not like any of those: tests of routers run on them too
ROUTERS = (*CONFIGS, "gemma4_text", "inkling_text")

# a small value for each entry that a family's config may have
_SMALL: dict[str, object] = {
    **_COMMON,
    **_SHARED,
    **dict.fromkeys(("num_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("moe_topk", "moe_k", "top_k_experts", "moe_top_k"), 2),
    **dict.fromkeys(("num_shared_experts", "moe_num_shared_experts", "n_group"), 1),
    **dict.fromkeys(("num_dense_layers", "moe_layer_start_index"), 0),
    "topk_group": 1,
    "head_dim": 8,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "shared_expert_intermediate_size": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mlp_layer_types": ["sparse"] * 2,
}
_GEMMA = {
    "enable_moe_block": True,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
}
_ODD: dict[str, dict[str, object]] = {
    "lfm2_moe": CONFIGS["lfm2_moe"],
    "gemma4_text": _GEMMA,
    "deepseek_v4": {"mlp_layer_types": ["moe", "moe"]},
    "flint": {"mlp_only_layers": []},
    "granitemoehybrid": {"layer_types": ["attention"] * 2, "mamba_n_heads": 4},
    "jamba": {"expert_layer_period": 1, "expert_layer_offset": 0},
    "mimo_v2_flash": {"head_dim": 12, "v_head_dim": 12, "layer_types": ["full_attention"] * 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 16, "adapter_out_dim": 16},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 16,
        "adapter_out_dim": 16,
        "per_layer_config": None,
    },
}


def moe_types() -> tuple[str, ...]:
    """Return the model types of transformers whose config, or a part of it, counts experts."""
    types = {name: CONFIG_MAPPING[name] for name in CONFIG_MAPPING_NAMES}
    return tuple(sorted(name for name, cls in types.items() if _counts_experts(cls)))


def _counts_experts(cls: Any) -> bool:
    parts = (getattr(cls, "sub_configs", None) or {}).values()
    return any(name.endswith("experts") for name in _entries(cls)) or any(
        map(_counts_experts, parts)
    )


def _entries(cls: Any) -> set[str]:
    own = (
        {field.name for field in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else set()
    )
    return own | set(getattr(cls, "attribute_map", ()))


def tiny_config(family: str) -> Any:
    """Return the config of a tiny model of any MoE family of transformers."""
    cls = CONFIG_MAPPING[family]
    return cls(**_small(cls))


def _small(cls: Any) -> dict[str, object]:
    names, aliases = _entries(cls), getattr(cls, "attribute_map", {})
    # an alias would say a second time what the entry behind it says
    names -= {alias for alias, name in aliases.items() if name in names}
    values = {name: value for name, value in _SMALL.items() if name in names}
    parts = {name: _small(part) for name, part in cls.sub_configs.items() if _entries(part)}
    return {**values, **parts, **_ODD.get(cls.model_type, {})}


def tiny(family: str, seed: int = 0, **changes: object) -> MoEModel:
    """Return a tiny random frozen float32 model in eval mode, its biases made non-zero."""
    own = {**_COMMON, **CONFIGS[family]} if family in CONFIGS else _small(CONFIG_MAPPING[family])
    config = AutoConfig.for_model(family, **{**own, **changes})
    return MoEModel(random_model(AutoModelForCausalLM, config, seed))


def random_model(auto: Any, config: Any, seed: int = 0) -> Any:
    """Return a random frozen float32 model of transformers in eval mode."""
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() >= 2 or name.endswith("bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.requires_grad_(False)


def tokens(count: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Return random token ids (count, length)."""
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(seed))
