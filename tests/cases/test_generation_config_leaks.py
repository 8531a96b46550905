"""The generation settings of a checkpoint decide neither calibration text nor continuations."""

import pytest
import torch
from parents import edit, parent

from rerail import api
from rerail.evaluate.continuation import continuation

SETTINGS = {
    "min_p": {"do_sample": True, "min_p": 0.9},
    "typical_p": {"do_sample": True, "typical_p": 0.2},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.01},
    "no_repeat": {"no_repeat_ngram_size": 1},
    "num_beams": {"num_beams": 2},
    "return_dict": {"return_dict_in_generate": True},
    "stop_strings": {"stop_strings": ["e"]},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "forced_bos": {"forced_bos_token_id": 7},
    "bad_words": {"bad_words_ids": [[5], [6]]},
    "no_cache": {"use_cache": False, "max_length": 7},
}


def written(folder) -> tuple[torch.Tensor, str]:
    teacher = api.load(str(folder))
    ids = api.text(teacher, "self", samples=4, block=16).input_ids
    return ids, continuation(teacher.model, teacher.tokenizer, "The", 12, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return parent(tmp_path_factory.mktemp("leaks") / "model")


@pytest.fixture(scope="module")
def expected(folder):
    return written(folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_that_is_written_changes(folder, expected, name):
    path = folder / "generation_config.json"
    before = path.read_text()
    edit(folder, "generation_config.json", **SETTINGS[name])
    try:
        ids, words = written(folder)
    finally:
        path.write_text(before)
    assert torch.equal(ids, expected[0])
    assert words == expected[1]


def test_the_model_keeps_its_own_settings(folder):
    teacher = api.load(str(folder))
    own = teacher.model.model.generation_config
    api.text(teacher, "self", samples=1, block=8)
    assert teacher.model.model.generation_config is own
