"""A model's own head, with whatever scale and soft cap it has, on hidden states from elsewhere."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from rerail.moe.families import body_of, router_logits_off


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return logits (..., V) for final hidden states (..., H), by the model's own forward."""
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    with router_logits_off(model.config), _body_returns(body_of(model), flat):
        # never looked at: the body below hands over `hidden` whatever it is given
        dummy = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
        out = model(input_ids=dummy, use_cache=False, return_dict=True)
    logits = cast(Tensor, out.logits)
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


class _BodyOutput(MoeModelOutputWithPast):
    """Has nothing else of what a family's body may return beside its hidden states."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextlib.contextmanager
def _body_returns(body: Any, hidden: Tensor) -> Iterator[None]:
    def forward(*_: Any, **__: Any) -> MoeModelOutputWithPast:
        return _BodyOutput(last_hidden_state=cast(Any, hidden))

    # an instance's forward (of a device map) is put back; the class's own comes back by itself
    own = body.__dict__.get("forward")
    body.forward = forward
    try:
        yield
    finally:
        del body.forward
        if own is not None:
            body.forward = own
