"""From text to blocks of tokens: a mix of sources, packed or padded, with a fingerprint."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int64
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rerail.errors import InputError
from rerail.files import digest
from rerail.text.corpora import Corpus, SelfText, Source
from rerail.text.documents import SPLITS, Split
from rerail.text.tokens import Text, check_block, first_ids, prefix_ids
from rerail.versions import package_version

BATCH_SIZE = 16  # blocks a forward


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of tokens.

    Attributes:
        input_ids: (N, S).
        mask: (N, S), true where a token is real.
        fingerprint: a hash of all that decided the tokens.
    """

    input_ids: Int64[torch.Tensor, "N S"]
    mask: Bool[torch.Tensor, "N S"]
    fingerprint: str

    def __len__(self) -> int:
        """Return N."""
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return int(self.mask.sum())

    def first(self, count: int) -> "TokenBlocks":
        """Return the leading blocks."""
        name = digest([self.fingerprint, count])
        return TokenBlocks(self.input_ids[:count], self.mask[:count], name)

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (input_ids, mask) of `size` blocks each, in order."""
        for first in range(0, len(self), size):
            yield self.input_ids[first : first + size], self.mask[first : first + size]


@dataclass(frozen=True)
class Calibration:
    """How a text is sampled.

    Attributes:
        sources: mixed in equal numbers of blocks, in turn.
        samples: number of blocks.
        block: tokens in a block.
        mode: `pack` joins documents by the end-of-text token and cuts full blocks; `pad` puts one
            document, truncated, in each block and masks the rest.
        seed: of the order of the documents; fewer samples are a prefix of more.
        split: which documents.
        batch_size: blocks a forward, where a model is measured on them.
        bos: what every block begins with, packed or padded: None for the tokenizer's own habit,
            true for the begin-of-text token, false for nothing. Text that the model writes itself
            begins as it does in any case.
    """

    sources: Sequence[Source]
    samples: int = 256
    block: int = 256
    mode: Literal["pack", "pad"] = "pack"
    seed: int = 0
    split: Split = "calibration"
    batch_size: int = BATCH_SIZE
    bos: bool | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources:
            raise InputError("calibration.sources is empty; name at least one source")
        for source in self.sources:
            if not isinstance(source, Source):
                raise InputError(
                    f"source {source!r} is none of Speeches(), Docs(), Files(...), Hub(...) and "
                    "SelfText() of rerail.text.corpora"
                )
        if self.samples < 1 or self.block < 2:
            raise InputError(
                f"samples={self.samples} and block={self.block}: "
                "at least 1 sample of 2 tokens is needed"
            )
        if self.batch_size < 1:
            raise InputError(f"calibration.batch_size={self.batch_size} must be at least 1")
        if self.mode not in ("pack", "pad"):
            raise InputError(f"mode={self.mode!r} is not one of pack, pad")
        if self.split not in SPLITS:
            raise InputError(f"split={self.split!r} is not one of {', '.join(SPLITS)}")

    @property
    def needs_model(self) -> bool:
        """Whether some of the text is written by the model itself."""
        return any(source.needs_model for source in self.sources)

    def check(self, config: Any) -> None:
        """Check that nothing is longer than the model has positions.

        Args:
            config: of transformers.

        Raises:
            InputError: blocks are, or texts that the model writes itself.
        """
        check_block(self.block, config)
        for source in self.sources:
            if isinstance(source, SelfText) and source.length is not None:
                check_block(source.length, config)

    def fingerprint(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return a hash of sources, settings, vocabulary and what blocks begin with."""
        prefix = prefix_ids(tokenizer, self.bos)
        begin = {"prefix": prefix} if prefix else {}  # text without one keeps its older hash
        return digest(
            {
                "sources": [source.fingerprint() for source in self.sources],
                "settings": [self.samples, self.block, self.mode, self.seed, self.split],
                "vocabulary": digest(tokenizer.get_vocab()),
                **begin,
            }
        )

    def store_key(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Return what decides every token: the fingerprint and all of the tokenizer.

        Returns:
            None where something else decides as well: a model that writes, a hub's branch, or a
            tokenizer that is code.
        """
        if not tokenizer.is_fast or not all(source.is_pinned for source in self.sources):
            return None
        settings = self.fingerprint(tokenizer)
        special = [tokenizer.eos_token_id, tokenizer.split_special_tokens]
        version = package_version("tokenizers")
        return digest([settings, special, version, tokenizer.backend_tokenizer.to_str()])

    def blocks(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None
    ) -> TokenBlocks:
        """Return the blocks; only as many documents are tokenised as they need.

        Args:
            tokenizer: the model's.
            model: the teacher, where a source is the teacher itself.

        Raises:
            InputError: a source is empty or too short, needs a model where `model` is None, or
                blocks are longer than the positions of the model.
        """
        if model is not None:
            self.check(model.config)
        count = -(-self.samples // len(self.sources))
        parts = [self._source_blocks(s, count, tokenizer, model) for s in self.sources]
        # stacked behind the block's index, so that the sources take turns
        ids = torch.stack([ids for ids, _ in parts], dim=1).flatten(0, 1)[: self.samples]
        mask = torch.stack([mask for _, mask in parts], dim=1).flatten(0, 1)[: self.samples]
        # settings do not decide what a model writes or what a hub returns: hash the tokens as well
        tokens = hashlib.sha256(ids.numpy().tobytes() + mask.numpy().tobytes()).hexdigest()
        return TokenBlocks(ids, mask, digest([self.fingerprint(tokenizer), tokens]))

    def _source_blocks(
        self,
        source: Source,
        count: int,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask of one source, (count, block) each."""
        if isinstance(source, SelfText):
            if model is None:
                raise InputError("self text is written by the teacher: give blocks() the model")
            ids = source.token_blocks(model, tokenizer, count, self.block, self.seed)
            return ids, torch.ones_like(ids, dtype=torch.bool)
        assert isinstance(source, Corpus)
        texts = [d.text for d in source.documents(self.split)]
        random.Random(self.seed).shuffle(texts)
        cut = self._packed if self.mode == "pack" else self._padded
        rows = cut(texts, count, tokenizer)
        if len(rows) < count:
            raise InputError(
                f"{source.name} ({self.split}) gives {len(rows)} blocks of {self.block} tokens "
                f"and {count} are asked for; lower samples or block of the calibration, or add text"
            )
        ids = torch.zeros(count, self.block, dtype=torch.int64)
        mask = torch.zeros(count, self.block, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return ids, mask

    def _packed(
        self, texts: list[Text], count: int, tokenizer: PreTrainedTokenizerBase
    ) -> list[list[int]]:
        stream: list[int] = []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        prefix = self._prefix(tokenizer)
        size = self.block - len(prefix)
        for text in texts:
            if len(stream) >= count * size:
                break
            stream += [*first_ids(tokenizer, text, count * size - len(stream)), *end]
        full = min(count, len(stream) // size)
        return [[*prefix, *stream[i * size : (i + 1) * size]] for i in range(full)]

    def _padded(
        self, texts: list[Text], count: int, tokenizer: PreTrainedTokenizerBase
    ) -> list[list[int]]:
        rows: list[list[int]] = []
        prefix = self._prefix(tokenizer)
        for text in texts:
            if len(rows) == count:
                break
            row = [*prefix, *first_ids(tokenizer, text, self.block)][: self.block]
            if len(row) >= 2 and len(row) > len(prefix):
                rows.append(row)
        return rows

    def _prefix(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return what every block begins with.

        Raises:
            InputError: it leaves no room for text.
        """
        prefix = prefix_ids(tokenizer, self.bos)
        if len(prefix) >= self.block:
            raise InputError(
                f"block={self.block} has no room for text after the {len(prefix)} tokens that the "
                "tokenizer puts before it; set a longer block, or bos=false"
            )
        return prefix


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Check that every token id has a row in the model.

    Raises:
        InputError: the tokenizer's ids do not fit.
    """
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} entries and the model {vocab_size}: they do not "
            "belong together; give the model's own tokenizer"
        )
