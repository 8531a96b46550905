"""A sweep that is killed again and again ends as one that never was; `make torture` kills more."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
torture = pytest.importorskip("torture")
sys.path.pop(0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_kills_at_random_moments_change_no_number_and_leave_nothing_torn(tmp_path):
    counts = torture.torture(4, torture.GRID[:1], 0, tmp_path)
    assert counts.kills.total() == 4
    assert counts.completed >= 1
    assert (counts.differing, counts.corrupt) == (0, [])


def test_a_torn_file_is_found(tmp_path):
    (tmp_path / "good.json").write_text("{}", encoding="utf-8")
    assert torture.unreadable(tmp_path) == []
    (tmp_path / "bad.json").write_text('{"a": ', encoding="utf-8")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\x00")
    assert [line.split(":")[0] for line in torture.unreadable(tmp_path)] == [
        "bad.json",
        "bad.safetensors",
    ]
