import platform

import pytest
import torch

from rerail.run.artefacts import peak_memory, start_peak


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux can start a new peak")
def test_a_peak_counts_what_is_freed_later_and_not_what_was_freed_before():
    start_peak()
    first = peak_memory()
    held = [torch.ones(1_000) for _ in range(50_000)]  # small pieces, which malloc keeps
    assert len(held) == 50_000
    high = peak_memory()
    del held
    start_peak()
    assert high - first > 180e6
    assert peak_memory() - first < 60e6
