"""Text sampled from a model: calibration without data."""

from typing import Any

import torch
from jaxtyping import Int64
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH = 16


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: int,
    block_length: int,
    seed: int,
    temperature: float = 1.0,
) -> Int64[torch.Tensor, "N S"]:
    """Return `blocks` texts of `block_length` tokens, sampled from the model's own distribution.

    A text starts with the tokenizer's bos, or with a random token where there is none. The end of
    text is a token like any other: what follows it is a new document, as in packed text. Equal
    seeds give equal texts, and fewer blocks are a prefix of more; the global random state is kept.

    Raises:
        InputError: the model writes tokens that its tokenizer does not know, but nothing else.
    """
    device = model.device
    devices = [device] if device.type == "cuda" else []
    parts: list[torch.Tensor] = []
    with torch.random.fork_rng(devices=devices):
        for first in range(0, blocks, _BATCH):
            # whole batches, each with its own seed: then a smaller sample is a prefix of a larger
            torch.manual_seed(seed * 1_000_003 + first)
            parts.append(_batch(model, tokenizer, block_length, temperature))
    empty = torch.empty(0, block_length, dtype=torch.int64)
    return torch.cat([empty, *parts])[:blocks]


def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, temperature: float
) -> torch.Tensor:
    start = _starts(tokenizer).to(model.device)
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "eos_token_id": None,
        "pad_token_id": 0,
        "min_new_tokens": length - 1,
        "max_new_tokens": length - 1,
    }
    written = model.generate(start, attention_mask=torch.ones_like(start), **options)
    return written.to("cpu", torch.int64)
