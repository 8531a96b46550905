"""From text to token ids: a long text in pieces, what stands before it, how long a block may be."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from rerail.errors import InputError

PIECE = 2**16  # characters of a longer text that are tokenised at once
_GROWTH = (1, 4, 16)  # pieces where neighbours differ are so many times as long


@runtime_checkable
class Text(Protocol):
    """A string, or what is read only as far as it is sliced."""

    def __getitem__(self, where: slice, /) -> str:
        """Return the characters at these places."""
        ...


class _Token(NamedTuple):
    id: int
    begin: int  # its characters in the text
    end: int


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text alone, without special tokens around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def first_ids(tokenizer: PreTrainedTokenizerBase, text: Text, count: int) -> list[int]:
    """Return the ids of a text alone: all of them, or of a long one at least the first `count`.

    A long text is tokenised in pieces, no further than it is needed. Two neighbours share a stretch
    of text, and are joined in its middle half where both cut that into the same tokens at the same
    places; where they differ (inside an unbroken run of one character, say) longer pieces are
    tried. So the ids are those of the whole text, with two exceptions: a tokenizer that looks
    further than the quarter of a stretch (512 characters) and yet agrees with itself, and a text
    whose neighbours differ even at a million characters, which is cut between them.

    A tokenizer that gives no places (one that is written in Python) takes the text whole.
    """
    for growth in _GROWTH:
        size = growth * PIECE
        if not tokenizer.is_fast or len(text[: size + 1]) <= size:
            break
        ids = _joined_ids(tokenizer, text, count, size, must_meet=growth < _GROWTH[-1])
        if ids is not None:
            return ids
    return plain_ids(tokenizer, text[:])


def _joined_ids(
    tokenizer: PreTrainedTokenizerBase, text: Text, count: int, size: int, must_meet: bool
) -> list[int] | None:
    """Return the ids of pieces of this many characters; None where two that must meet do not."""
    shared = size // 32
    ids: list[int] = []
    begin = first = 0  # of the piece, and of those of its tokens that count
    tokens = _tokens(tokenizer, text, 0, size)
    while len(ids) < count:
        end = begin + size
        if len(text[end : end + 1]) == 0:
            return ids + [t.id for t in tokens if t.begin >= first]
        begin = end - shared
        following = _tokens(tokenizer, text, begin, size)
        middle, same = (
            [t for t in some if begin + shared // 4 <= t.begin and t.end <= end - shared // 4]
            for some in (tokens, following)
        )
        meet = bool(middle) and middle == same
        if must_meet and not meet:
            return None
        place = middle[0].begin if meet else end - shared // 2
        ids += [t.id for t in tokens if first <= t.begin < place]
        first, tokens = place, following
    return ids


def _tokens(tokenizer: PreTrainedTokenizerBase, text: Text, begin: int, size: int) -> list[_Token]:
    piece = text[begin : begin + size]
    cut = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = zip(cut["input_ids"], cut["offset_mapping"], strict=True)
    return [_Token(i, begin + first, begin + last) for i, (first, last) in places]


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
