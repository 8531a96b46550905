"""A tokenizer that begins every text with a token does so in blocks; others change nothing."""

import json

import pytest
import torch
from parents import edit, parent

from rerail import api
from rerail.errors import InputError
from rerail.evaluate import continuation as continuing
from rerail.text.tokens import prefix_ids

BOS = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = parent(tmp_path_factory.mktemp("bos") / "model", vocab_size=4097, bos_token_id=BOS)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    first = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    text, other = ({"Sequence": {"id": n, "type_id": i}} for i, n in enumerate("AB"))
    template = {"type": "TemplateProcessing", "single": [first, text], "pair": [text, other]}
    template["special_tokens"] = {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}}
    added.append({**added[0], "id": BOS, "content": "<bos>"})
    edit(folder, "tokenizer.json", added_tokens=added, post_processor=template)
    edit(folder, "tokenizer_config.json", bos_token="<bos>")
    return folder


@pytest.fixture(scope="module")
def teacher(folder):
    return api.load(str(folder))


@pytest.mark.parametrize("mode", ["pack", "pad"])
def test_every_block_begins_as_the_tokenizer_begins_a_text(teacher, mode):
    options = {"samples": 4, "block": 64, "mode": mode}
    ids = api.text(teacher, "docs", **options).input_ids
    assert ids[:, 0].tolist() == [BOS] * 4
    assert (ids == BOS).sum() == 4
    without = api.text(teacher, "docs", bos=False, **options)
    assert not (without.input_ids == BOS).any()
    assert torch.equal(ids[0, 1:], without.input_ids[0, :-1])


def test_text_of_the_model_begins_so_too(teacher):
    ids = api.text(teacher, "self", samples=4, block=16).input_ids
    assert ids[:, 0].tolist() == [BOS] * 4


def test_the_fingerprint_knows_it(teacher):
    options = {"samples": 4, "block": 64}
    prints = {
        bos: api.preset("calibration", "docs", bos=bos, **options).fingerprint(teacher.tokenizer)
        for bos in (None, True, False)
    }
    assert prints[None] == prints[True] != prints[False]


def test_strings_and_prompts_begin_so_too(teacher, monkeypatch):
    assert api.text(teacher, ["a longer string"]).input_ids[0, 0] == BOS
    seen = []
    monkeypatch.setattr(continuing, "generate", lambda m, ids, *a, **k: seen.append(ids) or ids)
    continuing.continuation(teacher.model, teacher.tokenizer, "The", 4, 0)
    assert seen[0][0, 0] == BOS


def test_a_tokenizer_without_the_habit_adds_nothing_unless_asked():
    tokenizer = api.load("zoo:tiny_fine").tokenizer
    assert prefix_ids(tokenizer) == prefix_ids(tokenizer, bos=False) == []
    assert prefix_ids(tokenizer, bos=True) == [tokenizer.bos_token_id]
    plain = api.preset("calibration", "docs")
    never = api.preset("calibration", "docs", bos=False)
    assert plain.fingerprint(tokenizer) == never.fingerprint(tokenizer)


def test_a_token_that_is_not_there_is_refused(teacher):
    tokenizer = api.load("zoo:tiny_fine").tokenizer
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="bos=true asks for a begin-of-text token"):
        prefix_ids(tokenizer, bos=True)


def test_a_block_needs_room_for_text(teacher):
    with pytest.raises(InputError, match="2 tokens is needed"):
        api.text(teacher, "docs", samples=1, block=1)
