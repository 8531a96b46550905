"""What a model writes after a prompt, for the eye."""

from typing import Any

import torch

from rerail.moe.model import MoEModel
from rerail.text.self_text import generate
from rerail.text.tokens import plain_ids, prefix_ids


@torch.no_grad()
def continuation(model: MoEModel, tokenizer: Any, prompt: str, new_tokens: int, seed: int) -> str:
    """Return `new_tokens` tokens after a prompt, sampled with a fixed seed, as text.

    It is empty without a prompt, and for no tokens.
    """
    if not new_tokens or not prompt:
        return ""
    device = next(model.model.parameters()).device
    prompt_ids = [*prefix_ids(tokenizer), *plain_ids(tokenizer, prompt)]
    inputs = torch.tensor([prompt_ids], device=device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = generate(
            model.model,
            inputs,
            torch.ones_like(inputs),
            do_sample=True,
            temperature=0.8,
            top_k=40,
            max_new_tokens=new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            # only silences a warning: one prompt is never padded
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(out[0, inputs.shape[1] :], skip_special_tokens=True)
    return text
