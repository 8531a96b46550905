"""Tiny parents as users have them on disk, in bfloat16 and with the zoo's tokenizer."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoints import add_tokenizer
from pages import composed
from rerail import api
from rerail.run.cell import Cell
from rerail.run.compose import to_cell

BASE = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
QWEN = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "head_dim": 8,
    "norm_topk_prob": True,
}


def parent(folder: Path, family: str = "qwen3_moe", **changes: object) -> Path:
    """Write a random checkpoint, and return its folder."""
    extra = QWEN if family == "qwen3_moe" else {}
    config = AutoConfig.for_model(family, **{**BASE, **extra, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() >= 2:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15)
    model.to(torch.bfloat16).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def edit(folder: Path, file: str = "config.json", drop: tuple[str, ...] = (), **changes: object):
    """Change entries of a JSON file of a checkpoint."""
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    after = {name: value for name, value in before.items() if name not in drop}
    path.write_text(json.dumps({**after, **changes}))


def pruned(folder: Path) -> tuple[api.LanguageModel, api.LanguageModel, torch.Tensor]:
    """Return a teacher, its student of half the experts, and token ids to compare on."""
    teacher = api.load(str(folder))
    blocks = api.text(teacher, "docs", samples=4, block=32)
    return teacher, api.compress(teacher, "reap", 0.5, blocks), blocks.input_ids


def cell_of(folder: Path, *choices: str) -> Cell:
    """Return the cell of a command on a checkpoint."""
    return to_cell(composed("model=local", f"model.path_or_id={folder}", *choices))
