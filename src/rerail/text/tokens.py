"""From a string to token ids: what stands before every text, and how long a block may be."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from rerail.errors import InputError


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text alone, without special tokens around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def prefix_ids(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> list[int]:
    """Return the ids that stand before a text.

    Args:
        tokenizer: the model's.
        bos: None for the tokenizer's own habit (Mixtral, DeepSeek and Gemma begin every text with
            the begin-of-text token, and Qwen and OLMoE do not), true to begin with that token
            whatever the habit, false for nothing.

    Raises:
        InputError: `bos` is true and the tokenizer has no such token.
    """
    if bos is False:
        return []
    if bos and tokenizer.bos_token_id is None:
        raise InputError(
            "bos=true asks for a begin-of-text token and the tokenizer has none; leave it out, or "
            "set bos=false"
        )
    probe = "x"
    alone = plain_ids(tokenizer, probe)
    whole: list[int] = tokenizer(probe, verbose=False)["input_ids"]
    starts = [i for i in range(len(whole)) if alone and whole[i : i + len(alone)] == alone]
    habit = whole[: starts[0]] if starts else []
    return habit or ([tokenizer.bos_token_id] if bos else [])


def check_block(block: int, config: Any) -> None:
    """Check that blocks are no longer than the model has positions.

    Args:
        block: tokens of a block.
        config: of transformers; one that names no positions takes any block.

    Raises:
        InputError: they are longer.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and block > _stretched(text, positions):
        raise InputError(
            f"blocks of {block} tokens are longer than the {_stretched(text, positions)} positions "
            "that the model was made for (max_position_embeddings); set block to that or less"
        )


def _stretched(config: Any, positions: int) -> int:
    """Return the positions of a model, also where rotary embeddings are scaled to reach further."""
    scaling = getattr(config, "rope_parameters", None) or {}
    factor, trained = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if isinstance(factor, int | float) and isinstance(trained, int):
        return max(positions, int(factor * trained))
    return positions
