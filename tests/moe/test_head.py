"""The head of a model, on its own."""

import torch

from families import tiny


def test_no_states_give_no_logits_of_the_vocabularys_width() -> None:
    model = tiny("qwen3_moe")
    assert model.head(torch.zeros(0, model.layers[0].hidden_size)).shape == (0, model.vocab_size)
