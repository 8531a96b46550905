"""Large tensors between a GPU and the memory of the CPU.

A plain copy to or from pageable memory runs through one thread of the driver: 1.4 GB/s were
measured where the bus carries more than 20. Here two pinned buffers take turns: while the bus
fills or empties one, all cores copy the other.
"""

from collections.abc import Callable

import torch
from torch import Tensor

PIECE = 1 << 24  # bytes of a buffer


def free_bytes(device: torch.device) -> int:
    """Return the bytes that new tensors can take on a GPU; 0 on other devices."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device, itself where it is there already.

    The values are those of `tensor.to(device)`.
    """
    device = torch.device(device)
    between = {tensor.device.type, device.type} == {"cpu", "cuda"}
    if not between or tensor.nbytes <= PIECE:
        return tensor.to(device)
    source = tensor.detach().contiguous()
    target = torch.empty_like(source, device=device)
    copy = send if device.type == "cuda" else fetch
    copy(source.view(-1), target.view(-1), PIECE // source.element_size())
    return target


def send(source: Tensor, target: Tensor, piece: int) -> None:
    """Copy (N,) on the CPU to (N,) on a GPU, `piece` numbers at a time."""
    buffers, sent = _buffers(source, target, piece), [_no_wait, _no_wait]
    pairs = zip(torch.split(source, piece), torch.split(target, piece), strict=True)
    for i, (begin, end) in enumerate(pairs):
        sent[i % 2]()  # until then the bus reads this buffer
        buffer = buffers[i % 2][: len(begin)]
        buffer.copy_(begin)
        end.copy_(buffer, non_blocking=True)
        sent[i % 2] = _when_done(target)
    for wait in sent:
        wait()


def fetch(source: Tensor, target: Tensor, piece: int) -> None:
    """Copy (N,) on a GPU to (N,) on the CPU, `piece` numbers at a time."""
    buffers, arrived = _buffers(source, target, piece), [_no_wait, _no_wait]
    begins, ends = torch.split(source, piece), torch.split(target, piece)
    for i in range(len(begins) + 1):
        if i < len(begins):
            buffers[i % 2][: len(begins[i])].copy_(begins[i], non_blocking=True)
            arrived[i % 2] = _when_done(source)
        if i:  # the piece before this one, while the bus brings this one
            arrived[(i - 1) % 2]()
            ends[i - 1].copy_(buffers[(i - 1) % 2][: len(ends[i - 1])])


def _buffers(source: Tensor, target: Tensor, piece: int) -> list[Tensor]:
    pinned = "cuda" in (source.device.type, target.device.type)
    return [torch.empty(piece, dtype=source.dtype, pin_memory=pinned) for _ in range(2)]


def _no_wait() -> None:
    pass


def _when_done(on_gpu: Tensor) -> Callable[[], None]:
    """Return what waits for all that the GPU of a tensor was asked for until now."""
    if on_gpu.device.type != "cuda":
        return _no_wait
    event = torch.cuda.current_stream(on_gpu.device).record_event()
    return lambda: event.synchronize()
