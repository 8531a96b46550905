"""The teacher's final hidden states: live, or cached once for every student of the same text."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rerail.moe.model import MoEModel
from rerail.parallel import gather_on_first, my_share
from rerail.transfer import free_bytes, moved

Batch = tuple[Tensor, Tensor]
Progress = Callable[[Sequence[Batch]], Iterable[Batch]]


class Teacher(Protocol):
    """Answers with final hidden states (B, S, H) of the original model."""

    def hidden(self, index: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the states of a batch; `index` (B,) are the blocks' positions in their text."""


class LiveTeacher:
    """Runs the original model for every batch."""

    def __init__(self, model: MoEModel):
        self._model = [model]

    @property
    def model(self) -> MoEModel:
        """The original model itself."""
        return self._model[0]

    @torch.no_grad()
    def hidden(self, index: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Run the model."""
        return self._model[0].hidden(input_ids, mask)


class CachedTeacher:
    """Looks the states up: exact, since final norm and head of a student are the teacher's own.

    States that take at most an eighth of a GPU's free memory are brought there once, and not batch
    by batch in every step.

    Args:
        states: (N, S, H), one row a block, in the order of the text.
    """

    def __init__(self, states: Tensor):
        self.states = states
        self._placed = False

    def hidden(self, index: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the cached states on the device of the ids."""
        device = input_ids.device
        if not self._placed and 8 * self.states.nbytes <= free_bytes(device):
            self.states = moved(self.states, device)
        self._placed = True
        return self.states[index.to(self.states.device)].to(device)


@torch.no_grad()
def final_hidden_states(
    model: MoEModel, batches: Sequence[Batch], progress: Progress = lambda b: b
) -> Tensor:
    """Return the final hidden states (N, S, H) of all blocks, in the model's dtype, on the CPU.

    In a group of processes all must call it: each runs its part of the batches, and the first one
    gets all states; the others get their own.
    """
    device = next(model.model.parameters()).device
    _, own_batches = my_share(batches)
    own = [model.hidden(x.to(device), m.to(device)).cpu() for x, m in progress(own_batches)]
    states = [t for each in gather_on_first(own) for t in each] or own
    return torch.cat(states) if states else torch.empty(0)
