import pytest
import torch
from wordy import WORDS, word_tokenizer

from families import tiny
from rerail.errors import InputError
from rerail.text.corpora import SelfText
from rerail.text.self_text import sample_texts


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3_moe").model


def test_equal_seeds_give_equal_texts_and_fewer_are_a_prefix_of_more(model):
    tokenizer = word_tokenizer()
    state = torch.get_rng_state()
    many = sample_texts(model, tokenizer, 20, 8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(sample_texts(model, tokenizer, 20, 8, seed=3), many)
    assert torch.equal(sample_texts(model, tokenizer, 5, 8, seed=3), many[:5])
    assert many.shape == (20, 8)
    assert many.dtype == torch.int64
    assert len({tuple(row) for row in many.tolist()}) == 20
    assert not torch.equal(sample_texts(model, tokenizer, 20, 8, seed=4), many)


def test_end_of_text_is_followed_by_more_text(model):
    assert model.generation_config.eos_token_id == 0
    texts = sample_texts(model, word_tokenizer(), 16, 32, seed=0)
    ends = (texts[:, 1:-1] == 0).nonzero()
    assert len(ends) > 3
    assert sum(int(texts[row, column + 2]) != 0 for row, column in ends.tolist()) > 1


def test_texts_begin_with_bos_or_else_with_some_ordinary_word(model):
    with_bos = word_tokenizer(bos_token="x", eos_token="<end>")
    assert set(sample_texts(model, with_bos, 16, 2, seed=0)[:, 0].tolist()) == {WORDS.index("x")}
    first = sample_texts(model, word_tokenizer(), 64, 2, seed=0)[:, 0]
    assert len(set(first.tolist())) > 16
    assert 0 not in first


def test_tokens_that_only_pad_the_vocabulary_are_never_written(model):
    few = word_tokenizer(WORDS[:6])
    assert sample_texts(model, few, 16, 32, seed=0).max() < 6


def test_texts_come_from_the_distribution_of_the_model(model):
    tokenizer = word_tokenizer(bos_token="x")
    text = sample_texts(model, tokenizer, 1600, 2, seed=0)
    with torch.no_grad():
        expected = model(torch.tensor([[WORDS.index("x")]])).logits[0, -1].softmax(-1)
    found = torch.bincount(text[:, 1], minlength=64) / 1600
    assert (found - expected).abs().sum() / 2 < 0.1
    cold = sample_texts(model, tokenizer, 160, 2, seed=0, temperature=0.01)[:, 1]
    assert (cold == expected.argmax()).float().mean() > 0.9


def test_a_tokenizer_that_knows_no_token_of_the_model_is_refused(model):
    tokenizer = word_tokenizer()
    tokenizer.get_vocab = lambda: {"word": 64}
    with pytest.raises(InputError, match=r"knows none of the 64 tokens"):
        sample_texts(model, tokenizer, 1, 4, seed=0)


def test_self_text_of_another_length_is_cut_into_full_blocks(model):
    tokenizer = word_tokenizer()
    blocks = SelfText(length=6).token_blocks(model, tokenizer, 5, 8, seed=1)
    texts = sample_texts(model, tokenizer, 7, 6, seed=1)
    assert torch.equal(blocks.flatten(), texts.flatten()[:40])
    assert torch.equal(SelfText(length=6).token_blocks(model, tokenizer, 2, 8, seed=1), blocks[:2])
