"""The teacher's final hidden states: live, or cached once for every student of the same text."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rerail.files import file_digest, read_sealed, whole_file, write_sealed
from rerail.moe.model import MoEModel
from rerail.parallel import gather_on_first, my_share, read_or_make

log = logging.getLogger(__name__)

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

    @torch.no_grad()
    def hidden(self, index: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Run the model."""
        return self._model[0].hidden(input_ids, mask)


class CachedTeacher:
    """Looks the states up: exact, since final norm and head of a student are the teacher's own.

    Args:
        states: (N, S, H), one row a block, in the order of the text.
    """

    def __init__(self, states: Tensor):
        self.states = states

    def hidden(self, index: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the cached states on the device of the ids."""
        return self.states[index.to(self.states.device)].to(input_ids.device)


@torch.no_grad()
def speak(model: MoEModel, batches: Sequence[Batch], progress: Progress = lambda b: b) -> Tensor:
    """Return the final hidden states (N, S, H) of all blocks, in the model's dtype, on the CPU.

    In a group of processes all must call it: each speaks on its part of the batches, and the first
    one gets all states; the others get their own.
    """
    device = next(model.model.parameters()).device
    _, mine = my_share(batches)
    own = [model.hidden(x.to(device), m.to(device)).cpu() for x, m in progress(mine)]
    said = [t for states in gather_on_first(own) for t in states] or own
    return torch.cat(said) if said else torch.empty(0)


def cached_states(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """Return the states at `path`, made and written first where they are absent or damaged."""
    return read_or_make(lambda: _read(path), make, lambda states: _written(path, states))


def _read(path: Path) -> Tensor | None:
    held = read_sealed(path.with_suffix(".json"))
    if held is None or not path.exists():
        return None
    if file_digest(path) == held["sha256"]:
        try:
            return load_file(path)["hidden"]
        except SafetensorError:
            pass
    log.warning("%s is damaged (its hash does not match) and will be made again", path)
    return None


def _written(path: Path, states: Tensor) -> Tensor:
    with whole_file(path) as temporary:
        temporary.write_bytes(save({"hidden": states.contiguous()}))
    write_sealed(path.with_suffix(".json"), {"sha256": file_digest(path)})
    return states
