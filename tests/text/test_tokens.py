"""A long text is tokenised in pieces, and its ids are those of the whole text."""

import functools
import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from wordy import word_tokenizer

from rerail.moe.source import ModelSource
from rerail.text import tokens
from rerail.text.corpora import Docs
from rerail.text.tokens import first_ids, plain_ids

SIZE = 4096  # of the pieces of these tests
BYTES = pre_tokenizers.ByteLevel.alphabet()


@functools.cache
def prose() -> str:
    return "\n\n".join(d.text[:] for d in Docs().documents("heldout")[:300])


def trained(kind: str, pre_tokenizer=None, normalizer=None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of 600 entries that was trained on prose."""
    model, trainer = {
        "bpe": (models.BPE(), trainers.BpeTrainer(vocab_size=600, initial_alphabet=BYTES)),
        "fallback": (
            models.BPE(unk_token="?", byte_fallback=True, fuse_unk=True),
            trainers.BpeTrainer(vocab_size=600, special_tokens=["?"], max_token_length=16),
        ),
        "unigram": (
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=600, unk_token="?", special_tokens=["?"]),
        ),
        "wordpiece": (
            models.WordPiece(unk_token="?"),
            trainers.WordPieceTrainer(vocab_size=600, special_tokens=["?"]),
        ),
    }[kind]
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    # one word at a time: BPE without words is slow to train
    if pre_tokenizer is None:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    lines = [*prose()[:60_000].split("\n"), *(f"{i:03} " * 5 for i in range(300))]
    tokenizer.train_from_iterator(lines, trainer)
    if pre_tokenizer is None:
        tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def split(pattern: str):
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])


GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|\P{N}+"
BLANKS = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
KINDS = {
    "tiny_fine": lambda: ModelSource("zoo:tiny_fine").tokenizer(),
    "tiny_coarse": lambda: ModelSource("zoo:tiny_coarse").tokenizer(),
    "gpt2": lambda: trained("bpe", pre_tokenizers.ByteLevel(False)),
    "gpt2 with a blank before": lambda: trained("bpe", pre_tokenizers.ByteLevel(True)),
    "gpt4, as in Qwen": lambda: trained("bpe", split(GPT4), normalizers.NFC()),
    "digits from the right": lambda: trained("bpe", split(FROM_THE_RIGHT)),
    "one word, as in Mixtral": lambda: trained("fallback", None, BLANKS),
    "unigram": lambda: trained("unigram", pre_tokenizers.Metaspace(), normalizers.NFKC()),
    "bert": lambda: trained(
        "wordpiece", pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    ),
    "words": lambda: word_tokenizer(),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def digits(count: int) -> str:
    rng = random.Random(0)
    return "".join(rng.choice("0123456789") for _ in range(count))


TEXTS = {
    "prose": lambda: prose()[:30_000],
    "prose without line breaks": lambda: " ".join(prose().split())[:30_000],
    "one character": lambda: "-" * 20_000,
    "blanks": lambda: "a" + " " * 20_000 + "b c " * 2_000,
    "digits": lambda: f"x {digits(9_000)} y",
    "no blank at all": lambda: "".join(prose()[:40_000].split()),
    "signs of several bytes": lambda: "\u4e2d\u6587\U0001f642\U0001f469\u200d\U0001f4bb" * 2_000,
    "accents apart": lambda: "cafe\u0301 na\u0131\u0308ve \ufb01ne \u2460\r\n" * 1_000,
}


@pytest.mark.parametrize("text", TEXTS)
def test_the_ids_of_pieces_are_those_of_the_whole_text(tokenizer, monkeypatch, text):
    monkeypatch.setattr(tokens, "PIECE", SIZE)
    text = TEXTS[text]()
    whole = plain_ids(tokenizer, text)
    for count in (1, len(whole) // 2, len(whole) + 1):
        ids = first_ids(tokenizer, text, count)
        assert len(ids) >= min(count, len(whole))
        assert ids == whole[: len(ids)]


class Watched:
    """A text that notes how far it was read."""

    def __init__(self, text: str):
        self.text, self.read, self.longest = text, 0, 0

    def __getitem__(self, where: slice, /) -> str:
        part = self.text[where]
        end = len(self.text) if where.stop is None else where.stop
        self.read, self.longest = max(self.read, end), max(self.longest, len(part))
        return part


def test_a_long_text_is_read_and_tokenised_only_as_far_as_it_is_needed():
    tokenizer = ModelSource("zoo:tiny_fine").tokenizer()
    long = Watched(prose() * 20)
    ids = first_ids(tokenizer, long, 40_000)
    assert len(ids) >= 40_000
    whole = plain_ids(tokenizer, long.text[: long.read])
    assert ids == whole[: len(ids)]
    assert long.read < 6 * 40_000 < len(long.text)
    assert long.longest <= tokens.PIECE + 1


def test_pieces_that_do_not_meet_are_made_longer(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", SIZE)
    tokenizer = trained("bpe", split(FROM_THE_RIGHT))
    text = Watched(digits(9_000) + " and then prose. " + prose()[:20_000])
    assert first_ids(tokenizer, text, 10)[:10] == plain_ids(tokenizer, text.text)[:10]
    assert text.longest > SIZE + 1


def test_a_tokenizer_that_is_code_takes_the_whole_text(monkeypatch):
    tokenizer = ModelSource("zoo:tiny_fine").tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    long = Watched(prose()[:100_000])
    assert first_ids(tokenizer, long, 5) == plain_ids(tokenizer, long.text)


def test_a_text_whose_pieces_never_meet_is_cut_with_no_more_than_a_token_at_stake(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 1024)
    tokenizer = trained("bpe", split(FROM_THE_RIGHT))
    text = Watched("".join(f"{i:03}" for i in range(1000)) * 20)
    ids = first_ids(tokenizer, text, 10**6)
    assert text.longest == 16 * 1024 + 1
    assert abs(len(tokenizer.decode(ids)) - len(text.text)) <= 3 * 4  # four cuts
