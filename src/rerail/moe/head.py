"""A model's own head, with whatever scale and soft cap it has, on hidden states from elsewhere."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return logits (..., V) for final hidden states (..., H), by the model's own forward."""
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    with _body_returns(model, flat):
        dummy = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
        out = model(input_ids=dummy, use_cache=False, return_dict=True)
    logits = cast(Tensor, out.logits)
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


@contextlib.contextmanager
def _body_returns(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    body = model.base_model

    def forward(*_: Any, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=cast(Any, hidden))

    own = body.__dict__.get("forward")
    asked = model.config.__dict__.get("output_router_logits")
    body.forward = forward
    if asked:
        model.config.output_router_logits = False
    try:
        yield
    finally:
        del body.forward
        if own is not None:
            body.forward = own
        if asked:
            model.config.output_router_logits = asked
