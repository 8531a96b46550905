"""Text sampled from a model: calibration without data."""

from typing import Any, cast

import torch
from jaxtyping import Int64
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rerail.errors import InputError

_BATCH = 16
_Settings: Any = GenerationConfig  # whose class is not typed


@torch.no_grad()
def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: int,
    block_length: int,
    seed: int,
    temperature: float = 1.0,
) -> Int64[torch.Tensor, "N S"]:
    """Return `blocks` texts of `block_length` tokens, sampled from the model's own distribution.

    A text starts with the tokenizer's bos, or with a random token where there is none. The end of
    text is a token like any other: what follows it is a new document, as in packed text. Rows that
    pad the model's vocabulary are never sampled. Equal seeds give equal texts, and fewer blocks are
    a prefix of more. The global random state does not change.

    Raises:
        InputError: the tokenizer has no token of the model's.
    """
    device = model.device
    devices = [device] if device.type == "cuda" else []
    parts: list[torch.Tensor] = []
    with torch.random.fork_rng(devices=devices):
        for first in range(0, blocks, _BATCH):
            # whole batches, each with its own seed: then a smaller sample is a prefix of a larger
            torch.manual_seed(seed * 1_000_003 + first)
            parts.append(_sample_batch(model, tokenizer, block_length, temperature))
    empty = torch.empty(0, block_length, dtype=torch.int64)
    return torch.cat([empty, *parts])[:blocks]


def _sample_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, temperature: float
) -> torch.Tensor:
    known = _known_tokens(tokenizer, model.config.get_text_config().vocab_size)
    start = _first_tokens(tokenizer, known).to(model.device)
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "eos_token_id": None,
        "suppress_tokens": (~known).nonzero().flatten().tolist() or None,
        "pad_token_id": 0,
        "min_new_tokens": length - 1,
        "max_new_tokens": length - 1,
    }
    return generate(model, start, torch.ones_like(start), **options).cpu().long()


def generate(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any
) -> Int64[torch.Tensor, "B S"]:
    """Return prompts and what the model writes after them, as these options alone decide.

    What the checkpoint's own generation settings ask for (beams, penalties, `min_p`, stop strings)
    survives arguments of `generate`, so a fresh config stands in for them meanwhile.

    Args:
        model: of transformers.
        input_ids: prompts (B, S).
        attention_mask: true where a token is real (B, S).
        options: of generation.
    """
    own = model.generation_config
    model.generation_config = _Settings()
    asked = _Settings(**options)
    try:
        out = model.generate(input_ids, attention_mask=attention_mask, generation_config=asked)
    finally:
        model.generation_config = own
    return cast(torch.Tensor, out)


def _known_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """Return (vocab_size,) bool: which of the model's tokens the tokenizer can name."""
    known = torch.zeros(vocab_size, dtype=torch.bool)
    known[[i for i in tokenizer.get_vocab().values() if i < vocab_size]] = True
    if not known.any():
        raise InputError(
            f"the tokenizer has {len(tokenizer)} entries and knows none of the {vocab_size} tokens "
            "of the model; give the model's own tokenizer"
        )
    return known


def _first_tokens(tokenizer: PreTrainedTokenizerBase, known: torch.Tensor) -> torch.Tensor:
    """Return the first tokens of a batch, (_BATCH, 1)."""
    bos = tokenizer.bos_token_id
    if bos is not None:
        return torch.full((_BATCH, 1), bos)
    ordinary = known.clone()
    ordinary[[i for i in tokenizer.all_special_ids if i < len(known)]] = False
    return torch.multinomial((ordinary if ordinary.any() else known).double(), _BATCH, True)[
        :, None
    ]
