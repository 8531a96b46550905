"""What a model writes after a prompt, for the eye."""

from typing import Any, cast

import torch

from rerail.moe.model import MoEModel


@torch.no_grad()
def continuation(model: MoEModel, tokenizer: Any, prompt: str, new_tokens: int, seed: int) -> str:
    """Return `new_tokens` tokens after a prompt, sampled with a fixed seed, as text.

    It is empty without a prompt, and for no tokens.
    """
    if not new_tokens or not prompt:
        return ""
    device = next(model.model.parameters()).device
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = cast(Any, model.model).generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=True,
            temperature=0.8,
            top_k=40,
            max_new_tokens=new_tokens,
            # only silences a warning: one prompt is never padded
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text
