import copy
import dataclasses
import functools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from tokenizers import normalizers
from wordy import END, WORDS, Wordy, word_tokenizer

from families import tiny
from rerail import api
from rerail.config import presets
from rerail.errors import InputError
from rerail.moe.source import ModelSource
from rerail.text import tokens
from rerail.text.calibration import Calibration, TokenBlocks, check_vocabulary
from rerail.text.corpora import Corpus, Files, Hub, SelfText
from rerail.text.documents import SPLITS, split_of

MODES = ("pack", "pad")
PLAIN = Calibration([Wordy()], samples=4, block=8)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def with_(**changes) -> Calibration:
    return dataclasses.replace(PLAIN, **changes)


def read(row: torch.Tensor) -> list[str]:
    return [WORDS[i] for i in row.tolist()]


@pytest.mark.parametrize("mode", ["pack", "pad"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_block_holds_documents_of_its_own_split_only(tokenizer, mode, split):
    blocks = with_(mode=mode, split=split, samples=2).blocks(tokenizer)
    words = set(read(blocks.input_ids[blocks.mask])) - {END}
    assert words & set(SPLITS) == {split}
    assert {split_of(word) for word in words - {split}} == {split}


def test_packed_blocks_are_the_documents_joined_by_end_of_text_and_cut(tokenizer):
    blocks = with_(samples=10).blocks(tokenizer)
    assert blocks.mask.all()
    assert blocks.tokens == 10 * 8 == blocks.input_ids.numel()
    stream = read(blocks.input_ids.flatten())
    texts = " ".join(stream).removesuffix(f" {END}").split(f" {END} ")
    assert sorted(texts) == sorted(d.text for d in Wordy().documents("calibration"))


def test_padded_blocks_hold_one_document_each_and_mask_the_rest(tokenizer):
    short = with_(sources=[Wordy(length=5)], mode="pad").blocks(tokenizer)
    assert short.mask.sum(1).tolist() == [5] * 4
    assert short.mask[:, :5].all()
    assert short.tokens == 20
    known = {d.text for d in Wordy(length=5).documents("calibration")}
    rows = [" ".join(read(row[keep])) for row, keep in zip(*_both(short), strict=True)]
    assert set(rows) <= known
    assert len(set(rows)) == 4
    long = with_(mode="pad").blocks(tokenizer)
    assert long.mask.all()


def _both(blocks: TokenBlocks) -> tuple[torch.Tensor, torch.Tensor]:
    return blocks.input_ids, blocks.mask


@pytest.mark.parametrize("mode", ["pack", "pad"])
@pytest.mark.parametrize("sources", [[Wordy()], [Wordy(), Wordy(word="x"), Wordy(word="y")]])
def test_fewer_samples_are_a_prefix_of_more(tokenizer, mode, sources):
    more = with_(sources=sources, samples=7, mode=mode).blocks(tokenizer)
    for samples in (1, 2, 5):
        fewer = with_(sources=sources, samples=samples, mode=mode).blocks(tokenizer)
        assert len(fewer) == samples
        assert torch.equal(fewer.input_ids, more.input_ids[:samples])
        assert torch.equal(fewer.mask, more.mask[:samples])


def test_sources_take_turns(tokenizer):
    mix = with_(sources=[Wordy(word="x"), Wordy(word="y")], samples=5).blocks(tokenizer)
    words = [
        ("x" if "x" in read(row) else "") + ("y" if "y" in read(row) else "")
        for row in mix.input_ids
    ]
    assert words == ["x", "y", "x", "y", "x"]
    alone = with_(sources=[Wordy(word="y")], samples=2).blocks(tokenizer)
    assert torch.equal(mix.input_ids[1::2], alone.input_ids)


def test_the_order_is_fixed_by_the_seed_in_every_process(tokenizer):
    blocks = PLAIN.blocks(tokenizer)
    assert [int(row.max()) for row in blocks.input_ids] == [38, 21, 39, 39]
    again, other = PLAIN.blocks(tokenizer), with_(seed=1).blocks(tokenizer)
    assert torch.equal(again.input_ids, blocks.input_ids)
    assert again.fingerprint == blocks.fingerprint
    assert not torch.equal(other.input_ids, blocks.input_ids)


def test_the_fingerprint_covers_every_choice_and_the_vocabulary(tokenizer):
    variants = [
        *(PLAIN, with_(samples=3), with_(block=7), with_(mode="pad"), with_(seed=1)),
        *(with_(split="heldout"), with_(sources=[Wordy(word="x")])),
        with_(sources=[Wordy(), Wordy(word="x")]),
    ]
    prints = [v.fingerprint(tokenizer) for v in variants]
    prints.append(PLAIN.fingerprint(word_tokenizer((END, *reversed(WORDS[1:])))))
    assert len(set(prints)) == len(prints)
    held = [v.blocks(tokenizer).fingerprint for v in variants if v.samples > 3]
    assert len(set(held)) == len(held)
    assert PLAIN.fingerprint(word_tokenizer()) == prints[0]


@dataclass(frozen=True)
class Changing(Corpus):
    """A corpus whose text changes behind the same settings, as a hub data set without revision."""

    name: ClassVar[str] = "changing"
    texts: ClassVar[list[str]] = []

    def fingerprint(self):
        return {"name": self.name}

    def documents(self, split):
        return Wordy(word=self.texts[0]).documents(split)


def test_the_fingerprint_of_blocks_notices_text_that_changed_behind_its_settings(tokenizer):
    prints = []
    for text in ("x", "y", "x"):
        Changing.texts[:] = [text]
        prints.append(with_(sources=[Changing()]).blocks(tokenizer).fingerprint)
    assert prints[0] == prints[2] != prints[1]


def test_only_as_many_documents_are_tokenised_as_the_sample_needs(monkeypatch):
    tokenizer = word_tokenizer()
    seen = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, text, **o: (seen.append(text), call(self, text, **o))[1],
    )
    with_(samples=1).blocks(tokenizer)
    assert len([text for text in seen if text != "x"]) == 1  # which asks what begins a text


def test_self_text_fills_its_turns_and_is_told_apart_by_what_the_model_said(tokenizer):
    mix = with_(sources=[SelfText(), Wordy()])
    one, two = (tiny("qwen3_moe", seed).model for seed in (0, 1))
    blocks = mix.blocks(tokenizer, one)
    assert mix.needs_model
    assert not PLAIN.needs_model
    assert torch.equal(blocks.input_ids[1::2], with_(samples=2).blocks(tokenizer).input_ids)
    assert blocks.mask.all()
    assert blocks.fingerprint == mix.blocks(tokenizer, one).fingerprint
    assert blocks.fingerprint != mix.blocks(tokenizer, two).fingerprint
    with pytest.raises(InputError, match="self text is written by the teacher"):
        mix.blocks(tokenizer)


def test_a_tokenizer_without_end_of_text_packs_without_a_separator():
    blocks = PLAIN.blocks(word_tokenizer(bos_token=END))
    assert END not in read(blocks.input_ids.flatten())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sources": []}, "calibration.sources is empty"),
        ({"sources": ["speeches"]}, "source 'speeches' is none of Speeches"),
        ({"samples": 0}, "samples=0 and block=8"),
        ({"block": 1}, "samples=4 and block=1"),
        ({"mode": "cut"}, "mode='cut' is not one of pack, pad"),
        ({"split": "test"}, "split='test' is not one of train, calibration, heldout"),
    ],
)
def test_choices_that_cannot_be_used_are_refused_at_once(changes, sentence):
    given = copy.copy(PLAIN)
    for name, value in changes.items():
        object.__setattr__(given, name, value)  # no type checker of the tests may come first
    with pytest.raises(InputError, match=sentence):
        given.__post_init__()


def test_a_padded_block_without_a_target_is_left_out(tokenizer):
    with pytest.raises(InputError, match="gives 0 blocks of 8 tokens and 4 are asked for"):
        with_(sources=[Wordy(length=1)], mode="pad").blocks(tokenizer)


@pytest.mark.parametrize(("mode", "found"), [("pack", 10), ("pad", 8)])
def test_text_that_is_too_short_says_how_much_there_is(tokenizer, mode, found):
    with pytest.raises(
        InputError, match=rf"wordy \(calibration\) gives {found} blocks of 8 tokens and 99 are"
    ):
        with_(samples=99, mode=mode).blocks(tokenizer)


def test_a_short_file_is_too_short_and_an_empty_one_is_empty(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    for text, sentence in (("x y x", "files .* gives 0 blocks"), ("\n", "a.txt is empty")):
        path.write_text(text)
        with pytest.raises(InputError, match=sentence):
            with_(sources=[Files(str(path))]).blocks(tokenizer)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    check_vocabulary(tokenizer, 64)
    check_vocabulary(tokenizer, 99)
    with pytest.raises(InputError, match="tokenizer has 64 entries and the model 63"):
        check_vocabulary(tokenizer, 63)


def test_batches_are_the_blocks_in_order():
    ids = torch.arange(20).view(5, 4)
    blocks = TokenBlocks(ids, ids % 3 > 0, "f")
    batches = list(blocks.batches(2))
    assert [len(i) for i, _ in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([i for i, _ in batches]), ids)
    assert torch.equal(torch.cat([m for _, m in batches]), blocks.mask)
    assert len(blocks) == 5


@pytest.mark.parametrize(
    ("model", "preset", "fields", "fingerprint"),
    [
        ("tiny_fine", "docs", {"samples": 16, "block": 128}, "c7e6165bdbbd13f0"),
        ("tiny_coarse", "docs", {"samples": 24, "mode": "pad"}, "3929d91c89926ce4"),
        ("tiny_fine", "speeches", {"samples": 64, "split": "heldout"}, "2df4e9d5940a66b6"),
        ("tiny_fine", "mix", {"samples": 8, "bos": True}, "45aa7a9c6a863395"),
    ],
)
def test_blocks_of_presets_are_those_that_numbers_were_measured_on(
    model, preset, fields, fingerprint
):
    """The fingerprint of blocks hashes the tokens: the docs corpus and the zoo do not change."""
    tokenizer = ModelSource(f"zoo:{model}").tokenizer()
    assert presets.preset("calibration", preset, **fields).blocks(tokenizer).fingerprint == (
        fingerprint
    )


def test_a_block_of_a_long_document_is_that_of_the_whole_document(monkeypatch):
    tokenizer = word_tokenizer()
    long = with_(sources=[Wordy(length=5000)], samples=8, block=200)
    whole = {mode: with_(**vars(long) | {"mode": mode}).blocks(tokenizer) for mode in MODES}
    monkeypatch.setattr(tokens, "PIECE", 1024)
    for mode in MODES:
        assert with_(**vars(long) | {"mode": mode}).blocks(tokenizer).fingerprint == (
            whole[mode].fingerprint
        )


def test_the_key_of_stored_blocks_covers_all_of_the_tokenizer():
    key = PLAIN.store_key(word_tokenizer())
    lower, ends = word_tokenizer(), word_tokenizer(eos_token="x")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert PLAIN.fingerprint(lower) == PLAIN.fingerprint(word_tokenizer())
    others = [PLAIN.store_key(lower), PLAIN.store_key(ends), with_(seed=1).store_key(lower)]
    assert len({key, *others}) == 4
    assert key == PLAIN.store_key(word_tokenizer())


@pytest.mark.parametrize("source", [SelfText(), Hub("you/set"), Hub("you/set", revision="main")])
def test_text_that_its_fingerprint_does_not_decide_has_no_key(tokenizer, source):
    assert with_(sources=[Wordy(), source]).store_key(tokenizer) is None
    assert with_(sources=[Hub("you/set", revision="0123456789" * 4)]).store_key(tokenizer)


def test_a_tokenizer_that_is_code_has_no_key(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert PLAIN.store_key(tokenizer) is None


CONF = presets.config_root() / "conf"


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "calibration").glob("*.yaml")))
def test_what_blocks_begin_with_is_a_setting_of_every_text(name):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for word, value in (("null", None), ("true", True), ("false", False)):
            config = compose("config", [f"calibration={name}", f"calibration.bos={word}"])
            assert config.calibration.bos is value


def test_a_long_string_is_cut_as_the_whole_string_is(monkeypatch):
    tokenizer = word_tokenizer()
    long = " ".join(WORDS[1:]) + " "
    whole = api.text(tokenizer, [long * 30, "x y"], block=40)
    monkeypatch.setattr(tokens, "PIECE", 1024)
    monkeypatch.setattr(tokens, "plain_ids", functools.partial(_short_ids, tokens.plain_ids))
    assert torch.equal(api.text(tokenizer, [long * 30, "x y"], block=40).input_ids, whole.input_ids)


def _short_ids(plain, tokenizer, text):
    assert len(text) <= 1024
    return plain(tokenizer, text)
