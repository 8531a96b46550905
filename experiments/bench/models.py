"""What the bench measures on: a random model of about 400 million parameters, its REAP student."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from rerail.compress.base import make_plan
from rerail.methods.reap import MomentScore
from rerail.moe.model import MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Ratio
from rerail.statistics.collect import collect

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """A qwen3_moe model and a text, proportioned like Qwen3-30B-A3B: a head of about a tenth."""

    hidden: int = 512
    intermediate: int = 256
    experts: int = 64
    top_k: int = 8
    layers: int = 15
    vocabulary: int = 16_384
    batch: int = 4
    length: int = 256
    kl_vocabulary: int = 50_000
    kl_tokens: int = 1_024


def random_model(size: Size) -> MoEModel:
    config = Qwen3MoeConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        moe_intermediate_size=size.intermediate,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=size.hidden // 8,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return MoEModel(model.eval().requires_grad_(False))


def text(model: MoEModel, size: Size) -> Batch:
    """Return one batch of random tokens (batch, length) and its mask, all true."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (size.batch, size.length), generator=generator)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def reap_student(teacher: MoEModel, batch: Batch) -> MoEModel:
    reap = MomentScore()
    statistics = collect(teacher, [batch], reap.requires)
    return apply_plan(teacher, make_plan(reap, teacher.layers, statistics, Ratio(0.5), Uniform()))


def head_share(model: MoEModel, length: int) -> float:
    """Return the head's share of a forward's matrix products, from shapes.

    Weights count once a token (norms are vectors and do not), attention twice its keys.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    looked_up = 0 if config.tie_word_embeddings else head
    vectors = sum(p.numel() for p in model.model.parameters() if p.dim() == 1)
    width = config.num_attention_heads * config.head_dim
    attention = 2 * length * width * config.num_hidden_layers
    return head / (model.parameters_active() - looked_up - vectors + attention)
