import gc
import platform
import time

import pytest
import torch

from rerail.run.cost import freeze_imports, peak_memory, start_peak, with_cost
from rerail.store import Artefact, get


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


def test_what_making_took_is_stored_with_what_was_made(tmp_path):
    def make():
        time.sleep(0.05)
        return Artefact({"a": 1}, {"t": torch.ones(2)})

    made = get(tmp_path / "a.json", with_cost(make))
    again = get(tmp_path / "a.json", with_cost(make))
    assert 0.05 <= made.data["seconds"] < 5
    assert made.data["peak_memory"] > 10e6
    assert again.data == made.data
    assert made.data["a"] == 1
    assert torch.equal(again.tensors["t"], torch.ones(2))


def test_a_process_that_makes_nothing_costs_nothing():
    assert with_cost(lambda: None)() is None


def test_what_is_alive_at_the_first_cell_is_exempt_from_collection_once(monkeypatch):
    calls = []
    monkeypatch.setattr(gc, "collect", lambda: calls.append("collect"))
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    freeze_imports.cache_clear()
    freeze_imports()
    freeze_imports()
    assert calls == ["collect", "freeze"]
