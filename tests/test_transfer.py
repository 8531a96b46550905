"""Copies by pieces: every number arrives, in its place."""

import pytest
import torch

from rerail import transfer
from rerail.transfer import fetch, moved, send


@pytest.mark.parametrize("copy", [send, fetch])
@pytest.mark.parametrize("numbers", [1, 3, 4, 5, 8, 9, 23])
def test_every_piece_arrives(copy, numbers):
    source, target = torch.arange(numbers) + 1.0, torch.zeros(numbers)
    copy(source, target, 4)
    assert torch.equal(source, target)


def test_what_is_there_already_is_not_copied():
    tensor = torch.ones(3)
    assert moved(tensor, "cpu") is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
def test_a_large_tensor_goes_to_the_gpu_and_back(monkeypatch, dtype):
    monkeypatch.setattr(transfer, "PIECE", 1 << 12)
    there = torch.randint(0, 200, (7, 1003), device="cpu").to(dtype)
    away = moved(there, "cuda")
    assert away.device.type == "cuda"
    assert torch.equal(moved(away, "cpu"), there)
    assert torch.equal(moved(away.T, "cpu"), there.T)
