"""Tiny random models of many families: 2 MoE layers, 8 experts, top 2, hidden 16, 64 words."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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


def tiny(family: str, seed: int = 0, **changes: object) -> MoEModel:
    """Return a tiny random frozen float32 model in eval mode, its biases made non-zero."""
    config = AutoConfig.for_model(family, **{**_COMMON, **CONFIGS[family], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() >= 2 or name.endswith("bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return MoEModel(model)


def tokens(count: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Return random token ids (count, length)."""
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(seed))
